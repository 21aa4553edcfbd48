#!/usr/bin/env python
"""What LoRA adapters cost: requests over several random adapters, and the same requests to the model itself.

One engine serves both in turn, in one batch each; medians of tokens a second are compared.

    python scripts/bench_adapters.py --out benchmarks/results/adapters_cpu.json
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from bench_generation import SHAPES, write_shape
from bench_record import result_path, spread, write_result
from tqdm import tqdm

from jaxdeploy.bundled import bundled_model
from jaxdeploy.checkpoint.adapter import adaptable
from jaxdeploy.checkpoint.source import read_hf_config
from jaxdeploy.checkpoint.writing import put_json, put_tensors
from jaxdeploy.config import EngineConfig
from jaxdeploy.engine.front.build import build_engine
from jaxdeploy.engine.front.engine import Engine
from jaxdeploy.messages import Request, SamplingParams
from jaxdeploy.models.lora import HEAD
from jaxdeploy.models.registry import family_of

WORK = ("base", "adapters")


def main() -> None:
    """Run the benchmark."""
    args = parse_args()
    rates: dict[str, list[float]] = {name: [] for name in WORK}
    with tempfile.TemporaryDirectory() as scratch:
        running = engine(Path(scratch), args)
        for round_ in tqdm(range(args.rounds + 1), desc="rounds"):
            for name in WORK if round_ % 2 else reversed(WORK):
                rate = tokens_a_second(running, round_, args, adapters=name == "adapters")
                if round_:
                    rates[name].append(rate)
    metrics = {f"{name}_tok_s": spread(values) for name, values in rates.items()}
    ratio = metrics["adapters_tok_s"]["p50"] / metrics["base_tok_s"]["p50"]
    report(metrics, ratio)
    if args.out:
        config = {name: value for name, value in vars(args).items() if name != "out"}
        write_result(args.out, "adapters/1", config, metrics, {"adapters / base": round(ratio, 3)})


def parse_args() -> argparse.Namespace:
    """Flags of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model's folder (default: the bundled one)")
    parser.add_argument("--shape", choices=SHAPES, help="random weights of a built-in shape in place of a model")
    parser.add_argument("--adapters", type=int, default=8, help="adapters that the requests are spread over")
    parser.add_argument("--rank", type=int, default=16, help="rank of each, for all linear maps of the layers")
    parser.add_argument("--requests", type=int, default=16, help="requests in a batch")
    parser.add_argument("--prompt-len", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens of a reply")
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds of each (default: 9)")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", type=result_path, help="JSON file to write, usually under benchmarks/results/")
    return parser.parse_args()


def engine(scratch: Path, args: argparse.Namespace) -> Engine:
    """One with a slot for every adapter."""
    folder = Path(args.model or bundled_model())
    if args.shape:
        folder = scratch
        write_shape(folder, args.shape, args.prompt_len + args.new)
    hf = read_hf_config(folder)
    folders = {
        str(number): str(write_adapter(scratch / str(number), hf, number, args.rank)) for number in range(args.adapters)
    }
    config = EngineConfig(
        dtype=args.dtype,
        load_format="dummy" if args.shape else "auto",
        session_len=args.prompt_len + args.new,
        max_batch_size=args.requests,
        max_prefill_token_num=args.requests * args.prompt_len,
        enable_prefix_caching=False,
        warmup=False,  # the first round is not timed
        adapters=folders,
        max_loras=args.adapters,
        max_lora_rank=args.rank,
    )
    return build_engine(folder, hf, config, progress=True)


def write_adapter(folder: Path, hf: Mapping[str, Any], seed: int, rank: int) -> Path:
    """A random adapter in PEFT's layout."""
    random, tensors = np.random.default_rng(seed), {}
    family = family_of(hf)
    for path, linear in adaptable(family, family.model_config(hf)).items():
        for module, rows in zip(linear.modules, linear.outputs.rows, strict=True) if path != HEAD else ():
            for side, shape in (("A", (rank, linear.width)), ("B", (rows, rank))):
                drawn = 0.1 * random.standard_normal(shape, np.float32) / np.sqrt(np.float32(shape[1]))
                tensors[f"base_model.model.{module}.lora_{side}.weight"] = drawn
    folder.mkdir()
    put_json(folder / "adapter_config.json", {"peft_type": "LORA", "r": rank, "lora_alpha": rank})
    put_tensors(folder / "adapter_model.safetensors", tensors)
    return folder


def tokens_a_second(running: Engine, round_: int, args: argparse.Namespace, *, adapters: bool) -> float:
    """Generated tokens a second, prompts included in the time."""
    random = np.random.default_rng(round_)  # the same for both
    sampling = SamplingParams(max_new_tokens=args.new)
    prompts = random.integers(5, running.limits.vocab_size, (args.requests, args.prompt_len)).tolist()
    start = time.perf_counter()
    for row, prompt in enumerate(prompts):
        adapter = str(row % args.adapters) if adapters else None
        running.add(Request(str(row), tuple(prompt), sampling, adapter=adapter))
    count = 0
    while running.has_work:
        count += sum(len(output.token_ids) for output in running.step())
    assert count == args.requests * args.new, "a reply ended early"
    return count / (time.perf_counter() - start)


def report(metrics: Mapping[str, Any], ratio: float) -> None:
    """Print the medians."""
    from rich.console import Console

    lines = [f"{name}: {values['p50']:.0f}" for name, values in metrics.items()]
    Console().print(", ".join(lines), f"adapters / base: {ratio:.2f}")


if __name__ == "__main__":
    main()
