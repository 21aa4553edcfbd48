#!/usr/bin/env python
"""Speed of generation at fixed lengths: prefill and decode, ours alone or beside transformers in the same run.

Each case (concurrency, prompt tokens, new tokens) is timed ``--rounds`` times, the systems in turn, and medians are
compared. Prefill ends with the first new token; decode counts the tokens after it. ``--ceilings`` measures what the
device reaches by itself, and says how much of that we do.

    python scripts/bench_generation.py --compare transformers --out benchmarks/results/generation_cpu.json
    python scripts/bench_generation.py --shape llama-8b-w4a16 --also llama-8b --lmdeploy 1 16 --ceilings
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bench_record import result_path, spread, write_result
from kernel_timing import ceilings
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from jaxdeploy.checkpoint.source import read_hf_config
from jaxdeploy.config import EngineConfig
from jaxdeploy.engine.front.build import build_engine
from jaxdeploy.engine.front.engine import Engine
from jaxdeploy.messages import Request, SamplingParams
from jaxdeploy.models.config import ModelConfig
from jaxdeploy.models.registry import family_of
from jaxdeploy.models.weights import declared

PAUSE = 0.5
"""Seconds before each run: thread pools spin for a while after their last work, and would slow the other system."""

LMDEPLOY = ((1, 128), (128, 128), (128, 2048), (2048, 128))
"""(prompt, new) tokens that LMDeploy's own benchmark generates at every concurrency."""

LLAMA_8B: dict[str, Any] = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "rope_theta": 500000.0,
    "dtype": "bfloat16",
}
W4A16 = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-110m": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 2048,
        "vocab_size": 32000,
    },
    "llama-8b": LLAMA_8B,
    "llama-8b-w4a16": {**LLAMA_8B, "quantization_config": W4A16},
}
"""Shapes of real models, to run with random weights."""


@dataclass(frozen=True)
class Case:
    """``concurrency`` prompts of ``prompt`` tokens at once, each continued by ``new`` tokens."""

    concurrency: int
    prompt: int
    new: int

    def __str__(self) -> str:
        return f"{self.concurrency}x({self.prompt},{self.new})"

    def prompts(self, vocab_size: int) -> list[list[int]]:
        """The same random tokens for every system."""
        rng = np.random.default_rng(0)
        ids: list[list[int]] = rng.integers(3, vocab_size, (self.concurrency, self.prompt)).tolist()
        return ids


@dataclass(frozen=True)
class Timing:
    """Seconds until every sequence has its first token, and from there to the last."""

    prefill: float
    decode: float


System = Callable[[Case], Timing]

OURS = "jaxdeploy"


def main() -> None:
    """Run the benchmark."""
    args = parse_args()
    cases = list(dict.fromkeys([*args.decode, *args.prefill]))
    on_cpu = {"nbytes": 2**28, "side": 2048, "dtype": jnp.float32}
    reached = ceilings(args.rounds, **(on_cpu if jax.default_backend() == "cpu" else {})) if args.ceilings else {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(args.model or scratch)
        if args.model is None:
            write_shape(folder, args.shape, args.session_len)
        folders = {OURS: folder} | {f"{OURS} {shape}": folder / shape for shape in args.also}
        for shape in args.also:
            write_shape(folder / shape, shape, args.session_len)
        engines = {name: build(each, args, cases) for name, each in folders.items()}
        compiles = watch_compiles()
        systems: dict[str, System] = {name: partial(time_engine, engine) for name, engine in engines.items()}
        if args.compare == "transformers":
            systems["transformers"] = transformers(folder)
        timings = measure(systems, cases, args.rounds)
        configs = {name: read_hf_config(each) for name, each in folders.items()}
    metrics, ratios = summarise(timings, args.decode, args.prefill)
    metrics["compiles_after_warmup"] = len(compiles)
    report(metrics, ratios)
    if args.ceilings:
        metrics["ceilings"] = reached
        for name, engine in engines.items():
            model = family_of(configs[name]).model_config(configs[name])
            metrics[name]["share_of_ceilings"] = shares(engine, model, timings[name], reached)
        Console().print({name: metrics[name]["share_of_ceilings"] for name in engines})
    config = {key: value for key, value in vars(args).items() if key not in ("decode", "prefill", "out")}
    config |= {"decode": list(map(str, args.decode)), "prefill": list(map(str, args.prefill))}
    if args.out:
        write_result(args.out, "generation/1", config, metrics, ratios)


def parse_args() -> argparse.Namespace:
    """Flags of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model", help="folder of a checkpoint; only its config.json is used, weights are random")
    model.add_argument("--shape", choices=SHAPES, default="llama-110m", help="a built-in shape (default: llama-110m)")
    parser.add_argument("--also", choices=SHAPES, nargs="*", default=[], help="run these shapes of ours beside it")
    parser.add_argument("--decode", type=case, nargs="+", default=[Case(1, 128, 64), Case(8, 128, 64)], metavar="BxP+N")
    parser.add_argument("--prefill", type=case, nargs="+", default=[Case(1, 512, 2)], metavar="BxP+N")
    parser.add_argument(
        "--lmdeploy",
        type=int,
        nargs="+",
        metavar="B",
        help=f"in place of both, (prompt, new) tokens of LMDeploy's benchmark at these concurrencies: {LMDEPLOY}",
    )
    parser.add_argument(
        "--compile-all",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compile what an engine of this size may run, not only what these cases take (default: yes)",
    )
    parser.add_argument("--ceilings", action="store_true", help="measure the device's copy and matmul rates too")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds of each case (default: 7)")
    parser.add_argument("--dtype", default="auto", help="dtype of ours; transformers runs float32 on CPU")
    parser.add_argument("--session-len", type=int, default=1024)
    parser.add_argument("--compare", choices=("transformers",), help="run this beside ours ([parity] extra)")
    parser.add_argument("--out", type=result_path, help="JSON file to write, usually under benchmarks/results/")
    args = parser.parse_args()
    if args.lmdeploy:
        args.decode = args.prefill = [Case(count, *lengths) for count in args.lmdeploy for lengths in LMDEPLOY]
    longest = max(case.prompt + case.new for case in [*args.decode, *args.prefill])
    args.session_len = max(args.session_len, longest)
    return args


def case(text: str) -> Case:
    """``8x128+64``: 8 prompts of 128 tokens, 64 new ones each."""
    concurrency, _, lengths = text.partition("x")
    prompt, _, new = lengths.partition("+")
    return Case(int(concurrency), int(prompt), int(new))


def write_shape(folder: Path, name: str, session_len: int) -> None:
    """A ``config.json`` for a built-in shape."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "max_position_embeddings": session_len,
        **SHAPES[name],
    }
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))


def build(folder: Path, args: argparse.Namespace, cases: Sequence[Case]) -> Engine:
    """Our engine, sized for these cases and warmed up."""
    size = EngineConfig().block_size
    config = EngineConfig(
        dtype=args.dtype,
        load_format="dummy",
        session_len=args.session_len,
        max_batch_size=max(case.concurrency for case in cases),
        num_blocks=max(
            *(case.concurrency * -(-(case.prompt + case.new) // size) for case in cases), -(-args.session_len // size)
        ),
        enable_prefix_caching=False,  # every round asks the same
        warmup=False,
    )
    engine = build_engine(folder, read_hf_config(folder), config)
    if args.compile_all:
        engine.warm_up(lambda steps: tqdm(steps, desc="compiling"))
    else:
        for case in tqdm(cases, desc="compiling"):
            time_engine(engine, case)
    return engine


def watch_compiles() -> list[str]:
    """A list that gets an entry for every program compiled from now on."""
    compiles: list[str] = []

    def note(event: str, duration_secs: float, **_: str | int) -> None:
        if event.endswith("backend_compile_duration"):
            compiles.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    return compiles


def time_engine(engine: Engine, case: Case) -> Timing:
    """One run of ``case`` through the engine."""
    for index, prompt in enumerate(case.prompts(engine.limits.vocab_size)):
        engine.add(Request(str(index), tuple(prompt), SamplingParams(max_new_tokens=case.new)))
    start = time.perf_counter()
    began: set[str] = set()
    while engine.has_work and len(began) < case.concurrency:
        began |= {output.request_id for output in engine.step()}
    first = time.perf_counter()
    while engine.has_work:
        engine.step()
    return Timing(first - start, time.perf_counter() - first)


def transformers_model(folder: Path) -> Any:
    """A float32 model of transformers' with random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32).eval()


def generate_at(model: Any, ids: Any, mask: Any, new: int) -> list[float]:
    """Have transformers' ``generate`` give every row exactly ``new`` greedy tokens; when each of them came."""
    import torch
    from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

    times: list[float] = []

    class Clock(StoppingCriteria):  # type: ignore[misc]
        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
            times.append(time.perf_counter())
            return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    with torch.inference_mode():
        model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([Clock()]),
        )
    return times


def transformers(folder: Path) -> System:
    """Transformers' ``generate``: greedy, static batch, its default cache."""
    import torch

    model = transformers_model(folder)

    def run(case: Case) -> Timing:
        ids = torch.tensor(case.prompts(model.config.vocab_size))
        start = time.perf_counter()
        times = generate_at(model, ids, torch.ones_like(ids), case.new)
        return Timing(times[0] - start, times[-1] - times[0])

    return run


def measure(systems: dict[str, System], cases: Sequence[Case], rounds: int) -> dict[str, dict[Case, list[Timing]]]:
    """Every case on every system in turn; one round before the timed ones."""
    timings: dict[str, dict[Case, list[Timing]]] = {name: {case: [] for case in cases} for name in systems}
    for round_ in tqdm(range(rounds + 1), desc="rounds"):
        for case in cases:
            for name, run in systems.items():
                time.sleep(PAUSE)
                timing = run(case)
                if round_:
                    timings[name][case].append(timing)
    return timings


def summarise(
    timings: dict[str, dict[Case, list[Timing]]], decode: Sequence[Case], prefill: Sequence[Case]
) -> tuple[dict[str, Any], dict[str, float]]:
    """Medians per system and case, all samples, and ours ÷ theirs."""
    metrics: dict[str, Any] = {}
    for name, by_case in timings.items():
        metrics[name] = {
            **{
                f"decode_tok_s {case}": rates(case.concurrency * (case.new - 1), by_case[case], "decode")
                for case in decode
            },
            **{
                f"prefill_tok_s {case}": rates(case.concurrency * case.prompt, by_case[case], "prefill")
                for case in prefill
            },
        }
    ratios = {
        f"{measure} vs {other}": round(metrics[OURS][measure]["p50"] / metrics[other][measure]["p50"], 3)
        for other in timings
        if other != OURS
        for measure in metrics[other]
    }
    return metrics, ratios


def rates(tokens: int, timings: Sequence[Timing], part: str) -> dict[str, Any]:
    """Tokens per second: median, extremes and samples."""
    return spread(tokens / getattr(timing, part) for timing in timings)


def shares(
    engine: Engine, model: ModelConfig, timings: Mapping[Case, Sequence[Timing]], reached: Mapping[str, float]
) -> dict[str, float]:
    """How near each case comes to what the device can do.

    A decode step has to read the weights, a prefill to multiply each token by the matrices of all layers; in each its
    queries attend to half of the prompt on average.
    """
    linears = declared(model.layers[0], model.hidden_size)
    products = sum(linear.width * math.prod(linear.outputs) for linear in linears)
    attention = sum(linear.width for linear in linears if linear.path[0] == "attention" and not linear.feeds_cache)
    found = {}
    for case, each in timings.items():
        if case.new > 2:
            step = statistics.median(timing.decode for timing in each) / (case.new - 1)
            found[f"weights of copy bandwidth {case}"] = round(engine.weight_bytes / step / reached["copy_bytes_s"], 4)
        operations = 2 * model.num_layers * case.concurrency * case.prompt * (products + attention * case.prompt)
        first = statistics.median(timing.prefill for timing in each)
        found[f"operations of matmul rate {case}"] = round(operations / first / reached["matmul_flop_s"], 4)
    return found


def report(metrics: dict[str, Any], ratios: dict[str, float]) -> None:
    """Print the medians as a table."""
    systems = [name for name, value in metrics.items() if isinstance(value, dict)]
    table = Table("tokens per second", *systems, *(f"ours / {name}" for name in systems[1:]))
    for measure in metrics[OURS]:
        medians = [f"{metrics[name][measure]['p50']:.1f}" for name in systems]
        table.add_row(measure, *medians, *(f"{ratios[f'{measure} vs {name}']:.2f}" for name in systems[1:]))
    Console().print(table, f"compiles after warm-up: {metrics['compiles_after_warmup']}")


if __name__ == "__main__":
    main()
