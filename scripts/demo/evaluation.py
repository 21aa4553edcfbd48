"""How good the exported demo model is: exact replies on held-out dialogues, and a sample conversation."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from bench_record import write_result
from flax import nnx
from tqdm import tqdm

from demo.dialogues import Dialogue, make_dialogues
from demo.export import load
from demo.tokenizer import BOS, IM_END, IM_START, encode_dialogue, load_tokenizer
from demo.training import TrainConfig
from jaxdeploy.models.decoder import Decoder

if TYPE_CHECKING:
    from tokenizers import Tokenizer

EVALUATION_SEED = 20261120
LENGTH_STEP = 128
QUESTIONS = (
    "Hi, I'm Nadia.",
    "What does --tp do?",
    "And its default?",
    "What is 7 + 8?",
    "Add 5 to that.",
    "Do you remember my name?",
    "Thanks, bye!",
)
Reply = Callable[[list[dict[str, str]]], str]


def evaluate(folder: Path, config: TrainConfig) -> dict[str, Any]:
    """Exact-match rates of the model in ``folder``: per reply (overall and by topic) and per dialogue.

    A greedy reply to a right history is exactly right if, and only if, every token of the right reply is the most
    likely one after the right tokens before it; so one pass over the finished dialogue measures all its replies.
    """
    decoder, tokenizer = load(folder), load_tokenizer(folder)
    held_out = make_dialogues(EVALUATION_SEED, config.eval_dialogues, held_out=True)
    long = make_dialogues(EVALUATION_SEED, config.eval_dialogues // 5, held_out=True, turns=(5, 8))
    seen = make_dialogues(EVALUATION_SEED, config.eval_dialogues // 5)
    topics, dialogues = _rates(decoder, tokenizer, held_out)
    return {
        "held_out": topics,
        "held_out_dialogues_all_replies_right": dialogues,
        "held_out_5_to_8_turns": _rates(decoder, tokenizer, long)[0]["overall"],
        "held_out_5_to_8_turns_all_replies_right": _rates(decoder, tokenizer, long)[1],
        "training_combinations": _rates(decoder, tokenizer, seen)[0]["overall"],
    }


def _rates(decoder: Decoder, tokenizer: Tokenizer, dialogues: Sequence[Dialogue]) -> tuple[dict[str, Any], Any]:
    by_topic: dict[str, list[bool]] = defaultdict(list)
    whole = []
    for dialogue, right in zip(dialogues, _right_replies(decoder, tokenizer, dialogues), strict=True):
        whole.append(all(right))
        for turn, good in zip(dialogue.turns, right, strict=True):
            by_topic[turn.topic].append(good)
            by_topic["overall"].append(good)
    return {topic: _rate(results) for topic, results in sorted(by_topic.items())}, _rate(whole)


def _rate(results: Sequence[bool]) -> dict[str, float | int]:
    return {"exact_match": round(sum(results) / len(results), 4), "replies": len(results)}


def _right_replies(decoder: Decoder, tokenizer: Tokenizer, dialogues: Sequence[Dialogue]) -> Iterator[list[bool]]:
    """For each dialogue and reply: are all its tokens the most likely ones?"""
    most_likely = _most_likely(decoder)
    for dialogue in tqdm(dialogues, desc="evaluating", unit="dialogue", leave=False):
        ids, owner = encode_dialogue(tokenizer, dialogue)
        guesses = most_likely(ids)
        wrong = {reply for reply, token, guess in zip(owner[1:], ids[1:], guesses, strict=False) if token != guess}
        yield [reply not in wrong for reply in range(1, len(dialogue.turns) + 1)]


def _most_likely(decoder: Decoder) -> Callable[[Sequence[int]], np.ndarray]:
    """A function from token ids to the most likely next token after each of them; lengths are padded to a few."""
    graph, params = nnx.split(decoder)
    forward = jax.jit(lambda params, tokens: jnp.argmax(nnx.merge(graph, params)(tokens), axis=-1))

    def call(ids: Sequence[int]) -> np.ndarray:
        padded = np.zeros((1, -(-len(ids) // LENGTH_STEP) * LENGTH_STEP), np.int32)
        padded[0, : len(ids)] = ids
        return np.asarray(forward(params, padded))[0, : len(ids)]

    return call


def make_reply(folder: Path, *, most_tokens: int = 64) -> Reply:
    """A function from messages to the greedy reply; recomputes the whole sequence for every token."""
    most_likely, tokenizer = _most_likely(load(folder)), load_tokenizer(folder)
    return partial(_reply, most_likely, tokenizer, most_tokens)


def _reply(
    most_likely: Callable[[Sequence[int]], np.ndarray],
    tokenizer: Tokenizer,
    most_tokens: int,
    messages: list[dict[str, str]],
) -> str:
    text = "".join(f"{IM_START}{message['role']}\n{message['content']}{IM_END}\n" for message in messages)
    ids: list[int] = tokenizer.encode(f"{BOS}{text}{IM_START}assistant\n", add_special_tokens=False).ids
    start, stop = len(ids), tokenizer.token_to_id(IM_END)
    while len(ids) < start + most_tokens:
        token = int(most_likely(ids)[-1])
        if token == stop:
            break
        ids.append(token)
    return str(tokenizer.decode(ids[start:]))


def sample_conversation(folder: Path, questions: Sequence[str] = QUESTIONS) -> str:
    """The model's replies to ``questions``, its own replies being the history."""
    reply = make_reply(folder)
    messages: list[dict[str, str]] = []
    for question in questions:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": reply(messages)})
    return "\n".join(f"{'>' if message['role'] == 'user' else ' '} {message['content']}" for message in messages)


def write_results(
    file: Path, config: TrainConfig, losses: Sequence[float], metrics: dict[str, Any], folder: Path
) -> None:
    """The benchmark record: what was trained, and how good it is."""
    size = {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(nnx.state(load(folder), nnx.Param))),
        "bytes": sum(path.stat().st_size for path in folder.iterdir()),
        "trained_tokens": len(losses) * config.tokens_per_step,
        "final_loss": round(float(np.mean(losses[-50:])), 5),
    }
    ratios = {f"exact_match_{topic}": rate["exact_match"] for topic, rate in metrics["held_out"].items()}
    write_result(file, "demo_model/1", config.as_json(), {**size, **metrics}, ratios)
