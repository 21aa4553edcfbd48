"""How an engine stands, in numbers: plain and picklable, for those who watch it from another process."""

from __future__ import annotations

from dataclasses import dataclass, replace

from jaxdeploy.messages import NO_SPECULATION, SpeculationCounts

COUNTS = ("prompt_tokens", "cached_tokens", "restored_blocks", "generated_tokens", "steps", "preemptions", "restarts")
"""The fields of ``EngineStats`` that grow, beside ``speculation``."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Sequences and KV blocks now, and what has been counted since the engine began.

    ``cached_blocks`` nobody holds, but their content may still be found. ``prompt_tokens`` of all sequences that began
    to run, ``cached_tokens`` of them found in the cache; ``restored_blocks`` were brought back from host memory for it.
    While anything runs ``steps`` grows. ``speculation`` counts the drafts of all. ``adapters`` are those that
    requests may ask for, by name. ``restarts`` counts the new processes of an engine that died; ``fault`` is why it
    died, while it is being restarted.
    """

    waiting: int = 0
    running: int = 0
    blocks: int = 0
    active_blocks: int = 0
    cached_blocks: int = 0
    host_blocks: int = 0
    used_host_blocks: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    restored_blocks: int = 0
    generated_tokens: int = 0
    steps: int = 0
    preemptions: int = 0
    speculation: SpeculationCounts = NO_SPECULATION
    adapters: tuple[str, ...] = ()
    restarts: int = 0
    fault: str = ""

    def plus(self, earlier: EngineStats) -> EngineStats:
        """The same state, with the counts of ``earlier`` added."""
        sums = {name: getattr(self, name) + getattr(earlier, name) for name in COUNTS}
        speculation = SpeculationCounts(*map(sum, zip(self.speculation, earlier.speculation, strict=True)))
        return replace(self, speculation=speculation, **sums)

    @property
    def hit_rate(self) -> float:
        """Share of the prompt tokens that did not have to be computed."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0
