#!/usr/bin/env python
"""Perplexity of a checkpoint, float or quantised, on a text.

The text is cut into sequences, each judged on its own. --quant-policy 8 or 4 shows what such a KV cache costs.

    python scripts/eval_ppl.py jaxdeploy/demo
    python scripts/eval_ppl.py ./work_dir --text book.txt --quant-policy 8
    python scripts/eval_ppl.py internlm/internlm2-chat-7b --text wikitext2 --seqlen 2048 --samples 40
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_record import result_path, write_result

from jaxdeploy.checkpoint.source import read_hf_config, resolve_model
from jaxdeploy.compress.calibration import Calibration, Windows, calibration_ids
from jaxdeploy.compress.evaluate import Perplexity, load_decoder, perplexity
from jaxdeploy.errors import JaxdeployError
from jaxdeploy.models.decoder import Decoder
from jaxdeploy.models.registry import architecture_of
from jaxdeploy.tokenizer import Tokenizer

SCHEMA = "perplexity/1"
KV_CACHES = {0: "", 8: ", int8 KV cache", 4: ", int4 KV cache"}
"""Quant policy → what to add to a model's name."""


def main() -> int:
    """Measure, print one line; exit status 2 with one line where that cannot be."""
    return one_line_errors(lambda: measure(parse_args()))


def parse_args() -> argparse.Namespace:
    """Flags of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a checkpoint, or a hub id")
    parser.add_argument("--quant-policy", type=int, choices=KV_CACHES, default=0, help="KV cache (default: 0, float)")
    add_shared_arguments(parser)
    return parser.parse_args()


def add_shared_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags about the text and how to run, the same in ``eval_quality.py``."""
    parser.add_argument(
        "--text", help=".txt, .jsonl or .parquet file, or wikitext2, ptb, c4 …; default: the model's, or a bundled one"
    )
    parser.add_argument("--seqlen", type=positive, default=512, help="tokens in a sequence (default: 512)")
    parser.add_argument("--samples", type=positive, default=32, help="sequences, from the text's end (default: 32)")
    parser.add_argument("--batch-size", type=positive, default=1, help="sequences that run together (default: 1)")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    parser.add_argument("--tp", type=positive, default=1, help="devices that share each layer (default: 1)")
    parser.add_argument("--json", type=result_path, metavar="FILE", help="JSON file to write")


def positive(text: str) -> int:
    """A whole number above 0."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value


def one_line_errors(run: Callable[[], Any]) -> int:
    """The exit status of ``run``; a user's mistake is printed without a traceback."""
    try:
        run()
    except JaxdeployError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def measure(args: argparse.Namespace) -> Perplexity:
    """Load the model, measure, and say what came out."""
    folder = resolve_model(args.model)
    text = read_text(args, folder)
    found = perplexity(
        load(folder, args),
        text.held_out,
        scored=text.scored,
        batch_size=args.batch_size,
        kv_bits=args.quant_policy or None,
        progress=True,
    )
    name = f"{label(args.model)}{KV_CACHES[args.quant_policy]}"
    print(
        f"{name}: perplexity {found.ppl:.4f} ({found.nll:.4f} nats per token, {found.tokens:,} tokens, {text.source})"
    )
    if args.json:
        metrics = {"ppl": found.ppl, "nll_nats": found.nll, "tokens": found.tokens}
        write_result(args.json, SCHEMA, settings(args, text), metrics, {})
    return found


def read_text(args: argparse.Namespace, folder: Path) -> Calibration:
    """The sequences to measure on, cut by the tokenizer in ``folder``; one line where they are fewer than asked for."""
    architecture = architecture_of(read_hf_config(folder))
    text = calibration_ids(
        args.text,
        Tokenizer.load(folder),
        Windows(samples=0, held_out=args.samples, seqlen=args.seqlen),
        folder=folder,
        architecture=architecture,
    )
    if text.note:
        print(text.note, file=sys.stderr)
    return text


def load(folder: Path, args: argparse.Namespace) -> Decoder:
    """The decoder of ``folder``, as the flags want it."""
    return load_decoder(folder, dtype=args.dtype, tp=args.tp, progress=True)


def label(model: str) -> str:
    """A model's name: the folder's, or the hub id without its owner."""
    return Path(model).resolve().name


def settings(args: argparse.Namespace, text: Calibration) -> dict[str, Any]:
    """``config`` of a result: the flags, and the text as it was used."""
    flags = {name: value for name, value in vars(args).items() if not isinstance(value, Path)}
    sequences, seqlen = text.held_out.shape
    return {**flags, "source": text.source, "sequences": sequences, "seqlen": seqlen}


if __name__ == "__main__":
    sys.exit(main())
