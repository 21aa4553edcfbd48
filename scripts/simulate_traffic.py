#!/usr/bin/env python
"""Two hours of traffic through the scheduler, on a device that only takes its time: who waits how long, who is served.

An hour in which the device keeps up, then one in which every tenant asks for more than its share. Nothing is computed,
so a new idea for the scheduler shows its effect in minutes.

    python scripts/simulate_traffic.py --out benchmarks/results/traffic_simulated.json
"""

from __future__ import annotations

import argparse
import random
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from bench_record import result_path, write_result
from tqdm import tqdm

from jaxdeploy.engine.scheduling.block_manager import BlockManager
from jaxdeploy.engine.scheduling.limits import SchedulerLimits
from jaxdeploy.engine.scheduling.prefix_cache import PrefixCache
from jaxdeploy.engine.scheduling.scheduler import Scheduler
from jaxdeploy.engine.scheduling.sequence import Sequence
from jaxdeploy.engine.scheduling.waiting import PROMPT_COST, REPLY_COST
from jaxdeploy.messages import Request, SamplingParams

BLOCKS, HOST_BLOCKS, BLOCK_SIZE = 1200, 2000, 16
CAPACITY = 34.0
"""Requests of the mix below that the device can do in a second; found by running it."""
TENANTS = {"A": 1.0, "B": 1.5, "C": 2.5, "D": 5.0}
"""Who asks how often, relative to each other."""
HOUR = 3600.0
FIXED, PER_TOKEN = 0.008, 0.00006
"""Seconds of a step: 125 steps a second, and 16,000 tokens a second beside that."""


@dataclass
class Traffic:
    """Requests of all tenants at ``load`` times what the device can do, from ``start`` to ``end`` in seconds."""

    chance: random.Random
    load: float
    start: float
    end: float
    count: int = 0

    def requests(self) -> list[tuple[float, Request]]:
        """In order of their arrival."""
        total, arrivals = sum(TENANTS.values()), list[tuple[float, Request]]()
        for tenant, weight in TENANTS.items():
            when = self.start
            while (when := when + self.chance.expovariate(self.load * CAPACITY * weight / total)) < self.end:
                arrivals.append((when, self._request(tenant, len(arrivals))))
        return sorted(arrivals, key=lambda item: item[0])

    def _request(self, tenant: str, number: int) -> Request:
        """Mostly short, one in fifty very long; a third begins with what others begin with."""
        length = 4000 if self.chance.random() < 0.02 else int(self.chance.lognormvariate(5, 0.8)) + 1
        shared = min(256 * (self.chance.random() < 0.3), length)
        tokens = (*range(shared), *(self.chance.randrange(1000, 30_000) for _ in range(length - shared)))
        reply = min(int(self.chance.lognormvariate(4, 0.7)) + 1, 500)
        return Request(f"{tenant}{self.start}{number}", tokens, SamplingParams(max_new_tokens=reply), 0, tenant)


@dataclass
class Device:
    """Runs what is scheduled, one step ahead, in simulated time."""

    scheduler: Scheduler
    now: float = 0.0
    steps: int = 0
    served: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    waits: dict[str, float] = field(default_factory=dict)
    flight: list[Sequence] = field(default_factory=list)
    _arrived: dict[str, float] = field(default_factory=dict)

    def run(self, arrivals: list[tuple[float, Request]], until: float) -> None:
        """Until the time has come, and then on until everything is done where that is infinite."""
        coming = iter([*arrivals, (float("inf"), None)])
        when, request = next(coming)
        bar = tqdm(total=round(arrivals[-1][0] - arrivals[0][0]) if arrivals else 0, unit="simulated s", leave=False)
        start = self.now
        while self.now < until and (request is not None or self.scheduler.has_work):
            if not self.scheduler.has_work and request is not None:
                self.now = max(self.now, when)
            while request is not None and when <= self.now:
                self._arrived[request.request_id] = when
                self.scheduler.add(Sequence(request))
                when, request = next(coming)
            self._step()
            bar.update(max(round(self.now - start) - bar.n, 0))
        bar.close()

    def _step(self) -> None:
        batch = self.scheduler.schedule()
        self.scheduler.prefixes.transfers()
        chunks = [*batch.decodes, *batch.chunks]
        self.now += FIXED + PER_TOKEN * sum(chunk.length for chunk in chunks)
        self.steps += 1
        landed, self.flight = self.flight, [chunk.sequence for chunk in chunks if chunk.samples]
        tokens = {item: [7] for item in landed if item.finish_reason is None}
        self.scheduler.commit(tokens)
        for item in tokens:
            tenant, first = item.request.tenant, item.request_id not in self.waits
            self.served[tenant] += REPLY_COST + first * PROMPT_COST * item.prompt_length
            if first:
                self.waits[item.request_id] = self.now - self._arrived.pop(item.request_id)


def fairness(shares: Iterable[int]) -> float:
    """Jain's index: 1 where all are served alike, 1 / n where one is served alone."""
    shares = list(shares)
    return float(sum(shares) ** 2 / (len(shares) * sum(share**2 for share in shares)))


def new_scheduler() -> Scheduler:
    """As an engine would make it."""
    blocks = BlockManager(BLOCKS)
    return Scheduler(
        blocks,
        PrefixCache(blocks, BLOCK_SIZE, host_blocks=HOST_BLOCKS),
        SchedulerLimits(
            block_size=BLOCK_SIZE,
            max_batch_size=64,
            max_prefill_tokens=2048,
            max_mixed_tokens=512,
            row_length=32,
            session_len=8192,
        ),
    )


def simulate(device: Device, calm: float = HOUR, busy: float = HOUR, seed: int = 0) -> dict[str, Any]:
    """``calm`` seconds at three quarters of what the device can do, ``busy`` ones at three times as much, and the rest.

    What is found is in simulated seconds and in tokens, those of replies counting twice.
    """
    chance, scheduler = random.Random(seed), device.scheduler
    device.run(Traffic(chance, 0.75, 0.0, calm).requests(), calm)
    waits, before = sorted(device.waits.values()), dict(device.served)
    device.run(Traffic(chance, 3.0, calm, calm + busy).requests(), calm + busy)
    served = {tenant: device.served[tenant] - before[tenant] for tenant in TENANTS}
    left = list(scheduler._waiting)
    for sequence in left:  # patience ends
        scheduler.abort(sequence)
    device.run([], float("inf"))
    return {
        "steps": device.steps,
        "calm_wait_s": {"p50": waits[len(waits) // 2], "p99": waits[len(waits) * 99 // 100], "max": waits[-1]},
        "busy_served_tokens": served,
        "busy_waiting_at_the_end": len(left),
        "busy_fairness_index": fairness(served.values()),
        "found_in_cache": scheduler.prefixes.found / scheduler.prefixes.asked,
        "restored_from_host": scheduler.prefixes.restored,
        "preemptions": scheduler.preemptions,
    }


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=2.0, help="simulated hours, calm and busy together (default: 2)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=result_path, help="JSON file to write, usually under benchmarks/results/")
    args = parser.parse_args()
    half = args.hours * HOUR / 2
    metrics = simulate(Device(new_scheduler()), half, half, args.seed)
    report(metrics)
    if args.out:
        config = {
            "hours": args.hours,
            "seed": args.seed,
            "tenants": TENANTS,
            "blocks": BLOCKS,
            "host_blocks": HOST_BLOCKS,
        }
        write_result(args.out, "traffic/1", config, metrics, {"fairness index": metrics["busy_fairness_index"]})


def report(metrics: Mapping[str, Any]) -> None:
    """Print what was found."""
    from rich.console import Console
    from rich.table import Table

    table = Table("simulated", "")
    for name, value in metrics.items():
        table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    Console().print(table)


if __name__ == "__main__":
    main()
