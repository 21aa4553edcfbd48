#!/usr/bin/env python
"""Load a running server with requests, and report how long their tokens took: any server with OpenAI's completions.

Lengths come from a request trace (CSV with ContextTokens and GeneratedTokens), texts from a file in ShareGPT's form, or
all are alike (``1024+256``); see ``bench_throughput.py``. Closed loop: ``--concurrency`` requests run at any time. Open
loop: they come at ``--request-rate`` a second (Poisson), or with ``--arrivals`` when the trace says.

    jaxdeploy serve api_server --load-format dummy MODEL &
    python scripts/bench_serving.py trace.csv --model MODEL --prompt-scale 0.0625 --request-rate 4 --plot serving.png
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
from bench_record import picture_path, result_path, save_figure, write_result
from bench_throughput import Job, percentiles, read_jobs
from tqdm import tqdm

from jaxdeploy.checkpoint.source import read_hf_config, resolve_model

BLUE = "#2563eb"


@dataclass
class Served:
    """One request: seconds after the start of the run at which it was sent and its tokens came, or what went wrong."""

    sent: float = 0.0
    came: list[float] = field(default_factory=list)
    tokens: int = 0
    fault: str | None = None


def main() -> None:
    """Run the benchmark."""
    args = parse_args()
    folder = resolve_model(args.model, weights=False)
    jobs = arriving(read_jobs(args, read_hf_config(folder)["vocab_size"]), args.request_rate)
    served, seconds = asyncio.run(run(jobs, args))
    metrics = summary(served, seconds)
    report(metrics)
    if args.out:
        kept = {
            key: value for key, value in vars(args).items() if key not in ("out", "plot", "api_key", "file", "model")
        }
        write_result(args.out, "serving/1", {**kept, "file": Path(args.file).name, "model": folder.name}, metrics, {})
    if args.plot:
        draw(served, args.plot)


def parse_args() -> argparse.Namespace:
    """Flags of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="trace (.csv), conversations in ShareGPT's form (.json), or lengths: 1024+256")
    parser.add_argument("--url", default="http://127.0.0.1:23333", help="the server (default: %(default)s)")
    parser.add_argument("--model", required=True, help="its model: a folder or hub id, for vocabulary and tokenizer")
    parser.add_argument("--served-name", help="what the server calls it; default: its first model")
    parser.add_argument("--api-key", default="none")
    parser.add_argument("--num-prompts", type=int, default=64, help="requests, the first of the file (default: 64)")
    parser.add_argument("--prompt-scale", type=float, default=1.0, help="prompts of a trace times this, e.g. 0.0625")
    parser.add_argument("--session-len", type=int, default=8192, help="longest prompt and reply (default: 8192)")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for a request (default: 600)")
    pace = parser.add_mutually_exclusive_group()
    pace.add_argument("--concurrency", type=int, default=0, help="closed loop: requests at any time; 0: all at once")
    pace.add_argument("--request-rate", type=float, help="open loop: requests a second")
    pace.add_argument("--arrivals", action="store_true", help="open loop: when the trace says")
    parser.add_argument("--out", type=result_path, help="JSON file to write, usually under benchmarks/results/")
    parser.add_argument("--plot", type=picture_path, help="PNG file to write")
    return parser.parse_args()


def arriving(jobs: Sequence[Job], rate: float | None) -> list[Job]:
    """``jobs`` with times of a Poisson process of ``rate`` a second; as they are without one."""
    if rate is None:
        return list(jobs)
    gaps = np.random.default_rng(0).exponential(1 / rate, len(jobs))
    return [replace(job, comes=float(when)) for job, when in zip(jobs, np.cumsum(gaps) - gaps[0], strict=True)]


async def run(jobs: Sequence[Job], args: argparse.Namespace) -> tuple[list[Served], float]:
    """All requests, each when it is due; what became of them, and how long it took."""
    limits = httpx2.Limits(max_connections=None)
    headers = {"Authorization": f"Bearer {args.api_key}"}
    async with httpx2.AsyncClient(base_url=args.url, headers=headers, timeout=args.timeout, limits=limits) as client:
        name = args.served_name or (await client.get("/v1/models")).raise_for_status().json()["data"][0]["id"]
        places = asyncio.Semaphore(args.concurrency or len(jobs))
        start = time.perf_counter()
        with tqdm(total=len(jobs), desc="requests") as bar:

            async def one(job: Job) -> Served:
                await asyncio.sleep(job.comes - (time.perf_counter() - start))
                async with places:
                    found = await ask(client, name, job, start)
                bar.update()
                return found

            served = await asyncio.gather(*map(one, jobs))
        return served, time.perf_counter() - start


async def ask(client: httpx2.AsyncClient, name: str, job: Job, start: float) -> Served:
    """Stream one reply; a failure is noted, not raised."""
    body = {
        "model": name,
        "prompt": list(job.prompt),
        "max_tokens": job.new,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    served = Served(time.perf_counter() - start)
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                served.fault = f"HTTP {response.status_code}: {(await response.aread())[:200]!r}"
                return served
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    note(served, json.loads(line.removeprefix("data: ")), time.perf_counter() - start)
    except httpx2.HTTPError as error:
        served.fault = f"{type(error).__name__}: {error}"
    if served.fault is None and served.tokens != job.new:
        served.fault = f"{served.tokens} tokens came of {job.new}"
    return served


def note(served: Served, event: dict[str, Any], when: float) -> None:
    """Take in an event of the stream."""
    if "error" in event:
        served.fault = event["error"]["message"]
    elif event["choices"]:
        served.came.append(when)
    elif event.get("usage"):
        served.tokens = event["usage"]["completion_tokens"]


def summary(served: Sequence[Served], seconds: float) -> dict[str, Any]:
    """Rates and percentiles of the requests that were served in whole."""
    good = [each for each in served if each.fault is None]
    faults = sorted({each.fault for each in served if each.fault is not None})
    tokens = sum(each.tokens for each in good)
    metrics: dict[str, Any] = {
        "seconds": round(seconds, 3),
        "completed": len(good),
        "failed": len(served) - len(good),
        "faults": faults[:5],
        "request_s": round(len(good) / seconds, 3),
        "output_tok_s": round(tokens / seconds, 3),
    }
    if good:
        metrics["ttft_s"] = percentiles([each.came[0] - each.sent for each in good])
        metrics["e2e_s"] = percentiles([each.came[-1] - each.sent for each in good])
    if several := [each for each in good if each.tokens > 1]:
        metrics["tpot_s"] = percentiles([(each.came[-1] - each.came[0]) / (each.tokens - 1) for each in several])
        metrics["itl_s"] = percentiles([after - before for each in several for before, after in pairwise(each.came)])
    return metrics


def report(metrics: dict[str, Any]) -> None:
    """Print it."""
    from rich.console import Console
    from rich.table import Table

    table = Table("seconds", "p50", "p90", "p99")
    for name in ("ttft_s", "tpot_s", "itl_s", "e2e_s"):
        if name in metrics:
            table.add_row(name.removesuffix("_s"), *(f"{value:.4g}" for value in metrics[name].values()))
    console = Console()
    console.print(table)
    console.print({name: value for name, value in metrics.items() if not isinstance(value, dict)})


def draw(served: Sequence[Served], path: Path) -> None:
    """Write a plot: how many requests had their first token, and their last, within so many seconds."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    good = [each for each in served if each.fault is None]
    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    shares = np.arange(1, len(good) + 1) / max(len(good), 1)
    for name, style, at in (("first token", "-", 0), ("whole reply", "--", -1)):
        waits = sorted(each.came[at] - each.sent for each in good)
        axes.plot(waits, 100 * shares, style, color=BLUE, label=name, drawstyle="steps-post")
    axes.set(xlabel="seconds after the request", ylabel="% of requests", ylim=(0, 102), xlim=(0, None))
    axes.legend(loc="lower right", frameon=False)
    axes.set_title("How long requests waited", loc="left", fontsize=11, weight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    save_figure(figure, path)


if __name__ == "__main__":
    main()
