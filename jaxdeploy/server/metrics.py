"""What Prometheus reads: how the engine stands, and how long replies took."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

from jaxdeploy.engine.stats import EngineStats
from jaxdeploy.generation.reply import Reply
from jaxdeploy.messages import TextOutput

CONTENT_TYPE = CONTENT_TYPE_LATEST
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
SECONDS_PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """The counters and histograms of one server, in a registry of their own."""

    def __init__(self, model: str) -> None:
        self._registry = CollectorRegistry()
        self._model = model

        def gauge(name: str, help: str) -> Gauge:
            return Gauge(f"jaxdeploy:{name}", help, ["model_name"], registry=self._registry).labels(model)

        def histogram(name: str, help: str, buckets: Sequence[float]) -> Histogram:
            named = Histogram(f"jaxdeploy:{name}", help, ["model_name"], buckets=buckets, registry=self._registry)
            return named.labels(model)

        def counter(name: str, help: str) -> Counter:
            return Counter(f"jaxdeploy:{name}", help, ["model_name"], registry=self._registry).labels(model)

        self._running = gauge("num_requests_running", "Sequences that have a place in the batch")
        self._waiting = gauge("num_requests_waiting", "Sequences that wait for one")
        self._usage = gauge("kv_cache_usage_perc", "Share of the KV blocks that sequences hold, 0 to 1")
        self._hits = gauge("prefix_cache_hit_rate", "Share of all prompt tokens that were found in the cache, 0 to 1")
        self._preempted = counter("num_preemptions", "Sequences that had to make room for others")
        self._prompt = counter("prompt_tokens", "Prompt tokens of sequences that began to run")
        self._cached = counter("cached_prompt_tokens", "Of these, tokens that were found in the cache")
        self._generated = counter("generation_tokens", "Tokens generated")
        self._rounds = counter("spec_decode_num_drafts", "Verifications of draft tokens, one for each sequence")
        self._drafts = counter("spec_decode_num_draft_tokens", "Draft tokens")
        self._accepted = counter("spec_decode_num_accepted_tokens", "Of these, tokens that were right")
        self._rate = gauge("spec_decode_acceptance_rate", "Share of the draft tokens that were accepted, 0 to 1")
        self._length = gauge("spec_decode_mean_accepted_length", "Tokens that a verification gave")
        self._up = gauge("engine_up", "1 while the engine's process serves, 0 while it is being restarted")
        self._restarts = counter("engine_restarts", "Restarts of the engine's process after it died")
        self._first = histogram("time_to_first_token_seconds", "From a request to its first token", SECONDS)
        self._each = histogram("time_per_output_token_seconds", "Per token after the first", SECONDS_PER_TOKEN)
        self._whole = histogram("e2e_request_latency_seconds", "From a request to the end of its reply", SECONDS)
        self._ended = Counter(
            "jaxdeploy:request_success",
            "Replies that ended, by why",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )
        self._tasks = gauge("server_tasks", "Asynchronous tasks of the server")
        ProcessCollector(registry=self._registry)
        self._last = EngineStats()

    def take(self, stats: EngineStats) -> None:
        """Take over how the engine stands. Runs in the server's event loop."""
        self._tasks.set(len(asyncio.all_tasks()))
        self._running.set(stats.running)
        self._waiting.set(stats.waiting)
        self._usage.set(stats.active_blocks / stats.blocks if stats.blocks else 0.0)
        self._hits.set(stats.hit_rate)
        self._preempted.inc(stats.preemptions - self._last.preemptions)
        self._prompt.inc(stats.prompt_tokens - self._last.prompt_tokens)
        self._cached.inc(stats.cached_tokens - self._last.cached_tokens)
        self._generated.inc(stats.generated_tokens - self._last.generated_tokens)
        before, counts = self._last.speculation, stats.speculation
        self._rounds.inc(counts.rounds - before.rounds)
        self._drafts.inc(counts.drafts - before.drafts)
        self._accepted.inc(counts.accepted - before.accepted)
        self._rate.set(counts.acceptance_rate)
        self._length.set(counts.mean_length)
        self._up.set(not stats.fault)
        self._restarts.inc(stats.restarts - self._last.restarts)
        self._last = stats

    def text(self) -> str:
        """Everything, in Prometheus' text format."""
        return generate_latest(self._registry).decode()

    def note(self, reply: Reply, output: TextOutput) -> None:
        """Observe a reply after ``output`` was added to it."""
        if output.token_ids and reply.num_tokens == len(output.token_ids):
            self._first.observe(reply.time_to_first_token or 0.0)
        if output.finish_reason is not None:
            self._whole.observe(reply.updated_at - reply.started_at)
            if reply.time_per_token is not None:
                self._each.observe(reply.time_per_token)
            self._ended.labels(self._model, str(output.finish_reason)).inc()
