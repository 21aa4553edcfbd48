#!/usr/bin/env python
"""Speculative decoding on and off, in turns: where guesses are good, and where they are not.

``copy``: rewrite a text with one word changed. A grammar makes the reply that very text, and biases have it made of
the tokens that its tokenizer makes of it, as a good model would write it; guesses are looked up in the prompt (ngram).
``draft``: free text of a model with random weights, guesses of another of half its layers, which are as good as always
wrong: all that can be won is to notice it.

    python scripts/bench_speculation.py --texts ../shared/assets/text/wikitext2.valid.txt \
        --tokenizer ../shared/assets/tokenizers/llama2 --out benchmarks/results/speculation_cpu.json
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench_generation import SHAPES, write_shape
from bench_record import result_path, spread, write_result
from rich.console import Console
from tqdm import tqdm

import jaxdeploy.compress
from jaxdeploy import EngineConfig, GenerationConfig, Pipeline, Response, pipeline
from jaxdeploy.bundled import bundled_model
from jaxdeploy.engine.checks import MAX_BIASES
from jaxdeploy.messages import SpeculationCounts
from jaxdeploy.tokenizer import Tokenizer

OFF, ON = "off", "on"
TEXTS = Path(jaxdeploy.compress.__file__).parent / "text" / "default.txt"


def main() -> None:
    """Run the benchmark."""
    args = parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model, draft = prepare(Path(scratch, "model"), args), prepare(Path(scratch, "draft"), args, halved=True)
        copying = {"speculative_method": "ngram", "num_speculative_tokens": args.ngram_tokens}
        drafting = {"speculative_model": str(draft), "num_speculative_tokens": args.draft_tokens}
        metrics = {
            "copy": measure(model, copying, copy_tasks(args), args, settling=args.settling),
            "draft": measure(model, drafting, free_tasks(args), args, settling=args.settling),
        }
    ratios = {
        f"{task} tok_s, on / off": round(statistics.median(found["each_on_over_off"]), 4)
        for task, found in metrics.items()
    }
    Console().print(metrics, ratios)
    if args.out:
        config = {key: value for key, value in vars(args).items() if key not in ("out", "texts", "tokenizer")}
        write_result(args.out, "speculation/1", config, metrics, ratios)


def prepare(folder: Path, args: argparse.Namespace, *, halved: bool = False) -> Path:
    """A model of the shape, or of half its layers, with a real tokenizer; its weights are random ones."""
    write_shape(folder, args.shape, args.session_len)
    for file in args.tokenizer.glob("tokenizer*"):
        shutil.copy(file, folder)
    if halved:
        file = folder / "config.json"
        config = json.loads(file.read_text())
        file.write_text(json.dumps({**config, "num_hidden_layers": config["num_hidden_layers"] // 2}))
    return folder


Task = tuple[str, GenerationConfig]


def copy_tasks(args: argparse.Namespace) -> list[list[Task]]:
    """For each round ``batch`` prompts with a text of ``words`` words, to be written with another."""
    words, draw, tokenizer = args.texts.read_text().split(), random.Random(0), Tokenizer.load(args.tokenizer)
    rounds = []
    for _ in range(args.rounds + args.settling):
        tasks = []
        for _ in range(args.batch):
            start = draw.randrange(len(words) - args.words)
            text = words[start : start + args.words]
            changed = [*text[: len(text) // 2], draw.choice(words), *text[len(text) // 2 + 1 :]]
            usual = tokenizer.encode(" ".join(changed), add_bos=False)[:MAX_BIASES]
            how = GenerationConfig(
                do_sample=False, max_new_tokens=args.session_len // 2, logit_bias=preferred(usual, tokenizer)
            )
            how.response_format = {"type": "choice", "choice": [" ".join(changed)]}
            tasks.append((f"Rewrite this text with one word changed: {' '.join(text)}\n", how))
        rounds.append(tasks)
    return rounds


def preferred(token_ids: list[int], tokenizer: Tokenizer) -> dict[int, float]:
    """A bias for each token, the more the longer it is: of two that fit tokenizers take the longer."""
    return {token_id: min(40.0 + 5 * len(tokenizer.token_bytes(token_id)), 100.0) for token_id in token_ids}


def free_tasks(args: argparse.Namespace) -> list[list[Task]]:
    """For each round ``batch`` prompts, each continued by ``new`` tokens."""
    how = GenerationConfig(do_sample=False, max_new_tokens=args.new, ignore_eos=True)
    return [
        [(f"Tell story {round_} of {number}.", how) for number in range(args.batch)]
        for round_ in range(args.rounds + args.settling)
    ]


def measure(
    model: Path, speculation: dict[str, Any], tasks: list[list[Task]], args: argparse.Namespace, settling: int
) -> dict[str, Any]:
    """Tokens a second of all rounds but the first ``settling``, with guesses and without, one after the other."""
    shared = EngineConfig(
        load_format="dummy",
        session_len=args.session_len,
        max_batch_size=args.batch,
        max_prefill_token_num=512,
        num_blocks=args.num_blocks,
        warmup=args.compile_all,
    )
    rates: dict[str, list[float]] = {OFF: [], ON: []}
    guesses = SpeculationCounts()
    with ExitStack() as stack:
        sides = {
            name: stack.enter_context(pipeline(str(model), backend_config=shared, **settings))
            for name, settings in ((OFF, {}), (ON, speculation))
        }
        for round_, some in enumerate(tqdm(tasks, desc="rounds")):
            replies = {}
            for name in random.sample((OFF, ON), 2):
                rate, replies[name] = time_replies(sides[name], some)
                if round_ >= settling:
                    rates[name].append(rate)
            assert [r.token_ids for r in replies[OFF]] == [r.token_ids for r in replies[ON]], "guesses changed a reply"
            if round_ >= settling:
                guesses = SpeculationCounts(
                    *map(sum, zip(guesses, *(reply.speculation for reply in replies[ON]), strict=True))
                )
    return {
        **{f"{name}_tok_s": spread(each) for name, each in rates.items()},
        "each_on_over_off": [round(on / off, 4) for on, off in zip(rates[ON], rates[OFF], strict=True)],
        "acceptance_rate": round(guesses.acceptance_rate, 4),
        "mean_accepted_length": round(guesses.mean_length, 4),
        "guessed": guesses.drafts,
    }


def time_replies(pipe: Pipeline, tasks: list[Task]) -> tuple[float, list[Response]]:
    """Tokens a second of replies in one batch, from the first on: prompts take the same time with guesses."""
    prompts, configs = zip(*tasks, strict=True)
    replies = [Response("", 0, 0, 0) for _ in tasks]
    begun, tokens = None, 0
    for piece in pipe.stream_infer(list(prompts), list(configs), do_preprocess=False):
        replies[piece.index].extend(piece)
        if begun is None:
            begun, tokens = time.perf_counter(), -len(piece.token_ids)
        tokens += len(piece.token_ids)
    assert begun is not None, "every reply has a token"
    return tokens / (time.perf_counter() - begun), replies


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, default=TEXTS, help="texts to copy are taken from it (default: ours)")
    parser.add_argument("--tokenizer", type=Path, default=bundled_model(), help="its folder (default: the bundled one)")
    parser.add_argument("--shape", choices=SHAPES, default="llama-110m", help="a built-in shape (default: llama-110m)")
    parser.add_argument("--batch", type=int, default=1, help="replies at a time (default: 1)")
    parser.add_argument("--words", type=int, default=80, help="words of a text to copy (default: 80)")
    parser.add_argument("--new", type=int, default=256, help="tokens of a free reply (default: 256)")
    parser.add_argument("--ngram-tokens", type=int, default=7, help="guesses at a time from the prompt (default: 7)")
    parser.add_argument("--draft-tokens", type=int, default=3, help="guesses at a time of the draft (default: 3)")
    parser.add_argument("--settling", type=int, default=2, help="rounds before those that count (default: 2)")
    parser.add_argument("--rounds", type=int, default=9, help="rounds that count (default: 9)")
    parser.add_argument("--session-len", type=int, default=1024)
    parser.add_argument(
        "--compile-all",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compile what an engine may run before the first round, not only what it takes (default: yes)",
    )
    parser.add_argument("--num-blocks", type=int, help="KV blocks of each engine: two have to fit onto a GPU")
    parser.add_argument("--out", type=result_path, help="JSON file to write, usually under benchmarks/results/")
    return parser.parse_args()


if __name__ == "__main__":
    main()
