#!/usr/bin/env python
"""Replies that follow a JSON Schema: how many schemas can be followed, whether replies are valid, and what it costs.

Schemas are JSON lines with a ``schema`` each (the layout of JSONSchemaBench). The bundled model follows them; the cost
is measured on a model of a built-in shape with random weights and a real tokenizer, whose replies with and without a
schema take turns.

    python scripts/bench_structured.py ../shared/assets/prompts/jsonschema \
        --tokenizer ../shared/assets/tokenizers/llama2 --out benchmarks/results/structured_cpu.json
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench_generation import SHAPES, write_shape
from bench_record import result_path, spread, write_result
from rich.console import Console
from tqdm import tqdm

from jaxdeploy import EngineConfig, GenerationConfig, Pipeline, pipeline
from jaxdeploy.bundled import bundled_model
from jaxdeploy.errors import RequestError
from jaxdeploy.grammar.response_format import grammar_of
from jaxdeploy.tokenizer import Tokenizer

FREE, FOLLOWING = "free", "schema"

PUSH = 8.0
"""Added to the logits of tokens that bring a reply to its end."""

ENDLESS: dict[str, Any] = {
    "type": "array",
    "minItems": 1000,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 20},
            "age": {"type": "integer"},
            "kind": {"enum": ["cat", "dog", "bird"]},
            "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 3},
        },
        "required": ["name", "age", "kind"],
        "additionalProperties": False,
    },
}
"""Goes on for longer than any reply here, so that all have as many tokens."""


def main() -> None:
    """Run the benchmark."""
    args = parse_args()
    schemas = list(read_schemas(args.schemas))
    followed = [form for form in map(response_format, schemas) if is_followed(form)]
    metrics: dict[str, Any] = {
        "schemas": len(schemas),
        "followed": len(followed),
        "replies": generate(followed[:: args.every], args),
        "ms_per_token": cost(args),
    }
    medians = {name: metrics["ms_per_token"][name]["p50"] for name in (FREE, FOLLOWING)}
    ratios = {
        "followed / schemas": round(len(followed) / len(schemas), 4),
        "ms per token, schema / free": round(medians[FOLLOWING] / medians[FREE], 4),
    }
    Console().print(metrics, ratios)
    if args.out:
        config = {key: value for key, value in vars(args).items() if key not in ("out", "schemas", "tokenizer")}
        write_result(args.out, "structured/1", config, metrics, ratios)
    if metrics["replies"].get("invalid"):
        raise SystemExit("a complete reply does not follow its schema")


def parse_args() -> argparse.Namespace:
    """Flags of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("schemas", type=Path, help="folder of *.jsonl files, or one of them")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of a tokenizer, for the shape")
    parser.add_argument("--shape", choices=SHAPES, default="llama-110m", help="a built-in shape (default: llama-110m)")
    parser.add_argument("--batch", type=int, default=16, help="replies at a time (default: 16)")
    parser.add_argument("--new", type=int, default=64, help="tokens of each timed reply (default: 64)")
    parser.add_argument("--rounds", type=int, default=6, help="timed rounds (default: 6)")
    parser.add_argument("--longest", type=int, default=400, help="tokens of a reply to be validated (default: 400)")
    parser.add_argument("--every", type=int, default=1, help="generate for every such schema alone (default: 1)")
    parser.add_argument("--out", type=result_path, help="JSON file to write, usually under benchmarks/results/")
    return parser.parse_args()


def read_schemas(where: Path) -> Iterator[Any]:
    """All schemas, file by file."""
    for file in sorted(where.glob("*.jsonl")) if where.is_dir() else [where]:
        for line in file.read_text(encoding="utf-8").splitlines():
            yield json.loads(line)["schema"]


def response_format(schema: Any) -> dict[str, Any]:
    """What asks for a reply of ``schema``."""
    return {"type": "json_schema", "json_schema": {"schema": schema}}


def is_followed(form: dict[str, Any]) -> bool:
    """Whether ``form`` can be followed to the letter."""
    try:
        return grammar_of(form) is not None
    except RequestError:
        return False


def generate(forms: list[dict[str, Any]], args: argparse.Namespace) -> dict[str, int]:
    """Have the bundled model write something for each of ``forms``; how many became what."""
    config = EngineConfig(max_batch_size=args.batch, session_len=args.longest + 64)
    found: Counter[str] = Counter()
    with pipeline(bundled_model(), backend_config=config) as pipe:
        towards_end = biases(pipe.tokenizer)
        for start in tqdm(range(0, len(forms), args.batch), desc="replies"):
            some = forms[start : start + args.batch]
            configs = [
                GenerationConfig(
                    max_new_tokens=args.longest,
                    temperature=1.0,
                    random_seed=start,
                    response_format=form,
                    logit_bias=towards_end,
                )
                for form in some
            ]
            replies = pipe(["Write something in that form."] * len(some), configs, use_tqdm=False)
            assert isinstance(replies, list)
            found.update(
                verdict(form, reply.text, str(reply.finish_reason)) for form, reply in zip(some, replies, strict=True)
            )
    return dict(found)


def biases(tokenizer: Tokenizer) -> dict[int, float]:
    """Away from white space, towards what closes a string, a list or an object: a small model comes to no end else."""
    found = {}
    for token_id in range(tokenizer.vocab_size):
        text = tokenizer.token_bytes(token_id)
        if text.startswith((b'"', b"]", b"}")):
            found[token_id] = PUSH
        elif text and not text.strip():
            found[token_id] = -PUSH
    return found


def verdict(form: dict[str, Any], text: str, finish_reason: str) -> str:
    """``truncated`` if there was no room for the end, else ``valid`` or ``invalid``."""
    if finish_reason != "stop":
        return "truncated" if finish_reason == "length" else finish_reason
    schema = form["json_schema"]["schema"]
    try:
        from jsonschema.validators import validator_for  # of the [bench] extra, which --help does not need

        validator_for(schema)(schema).validate(json.loads(text))
    except Exception as error:  # of a validator as of a parser
        print(f"invalid: {text[:200]!r}: {str(error)[:200]}")
        return "invalid"
    return "valid"


def cost(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Milliseconds between two tokens of a reply, with a schema and without, all else equal."""
    kinds = {FREE: None, FOLLOWING: response_format(ENDLESS)}
    times: dict[str, list[float]] = {name: [] for name in kinds}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "model")
        write_shape(folder, args.shape, 256)
        for file in args.tokenizer.iterdir():
            shutil.copy(file, folder)
        config = EngineConfig(load_format="dummy", session_len=256, max_batch_size=args.batch, warmup=False)
        with pipeline(str(folder), backend_config=config) as pipe:
            for round_ in tqdm(range(args.rounds + 1), desc="rounds"):
                for name, form in kinds.items():
                    each = time_tokens(pipe, form, args, round_)
                    if round_:  # the first one compiles
                        times[name].append(statistics.median(each))
    return {name: spread(1000 * value for value in each) for name, each in times.items()}


def time_tokens(pipe: Pipeline, form: dict[str, Any] | None, args: argparse.Namespace, seed: int) -> list[float]:
    """Seconds a token after the first, of every reply of a batch."""
    config = GenerationConfig(
        max_new_tokens=args.new,
        temperature=1.0,
        random_seed=seed,
        response_format=form,
        ignore_eos=True if form is None else None,
    )
    first: dict[int, float] = {}
    last: dict[int, float] = {}
    count: Counter[int] = Counter()
    for piece in pipe.stream_infer(
        [f"Write list {number}." for number in range(args.batch)], config, do_preprocess=False
    ):
        now = time.perf_counter()
        first.setdefault(piece.index, now)
        last[piece.index] = now
        count[piece.index] += len(piece.token_ids)
    assert set(count.values()) == {args.new}, f"a reply ended early: {count}"
    return [(last[index] - first[index]) / (args.new - 1) for index in first]


if __name__ == "__main__":
    main()
