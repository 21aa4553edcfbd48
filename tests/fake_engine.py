"""An engine without a model that is ahead of its front, as one in another process is."""

from __future__ import annotations

import random
from collections import deque
from concurrent.futures import Future
from pathlib import Path

from jaxdeploy.engine.checks import RequestLimits
from jaxdeploy.engine.stats import EngineStats
from jaxdeploy.errors import RequestError, RequestFailedError
from jaxdeploy.messages import FinishReason, Request, StepOutput
from tests.tiny_models import SESSION_LEN, VOCAB

UNREADABLE = 1000
"""A token that ``tiny_text.Pairs`` cannot decode."""


class BurstEngine:
    """A reply is the prompt, token by token. ``step`` returns up to ``burst`` outputs of each request.

    The last token says how a reply ends: a multiple of 3 by length, of 3 and 1 more by a fault, else by a deadline.
    ``ended`` counts the requests that ended here or were aborted.
    """

    limits = RequestLimits(SESSION_LEN, VOCAB)

    def __init__(self, seed: int = 0, burst: int = 6) -> None:
        self.added = self.ended = 0
        self._random, self._burst = random.Random(seed), burst
        self._left: dict[str, deque[int]] = {}

    @property
    def has_work(self) -> bool:
        return bool(self._left)

    @property
    def stats(self) -> EngineStats:
        return EngineStats(running=len(self._left))

    def add(self, item: Request) -> None:
        if item.request_id in self._left:
            raise RequestError(f"request_id={item.request_id} is in use; choose another")
        self.added += 1
        self._left[item.request_id] = deque(item.prompt_token_ids)

    def abort(self, request_id: str) -> None:
        self.ended += self._left.pop(request_id, None) is not None

    def step(self) -> list[StepOutput]:
        outputs: list[StepOutput] = []
        for name in list(self._left):
            outputs += self._some(name, self._random.randint(0, self._burst))
        return outputs

    def load_adapter(self, name: str, folder: str | Path) -> Future[None]:
        raise NotImplementedError

    def unload_adapter(self, name: str) -> Future[None]:
        raise NotImplementedError

    def wake(self) -> None:
        """It never waits."""

    def close(self) -> None:
        """Nothing to free."""

    def _some(self, name: str, count: int) -> list[StepOutput]:
        outputs = []
        for _ in range(count):
            token = self._left[name].popleft()
            reason = None if self._left[name] else how_it_ends(token)
            error = RequestFailedError("no luck") if reason is FinishReason.ERROR else None
            outputs.append(StepOutput(name, (token,), reason, error=error))
            if reason is not None:
                del self._left[name]
                self.ended += 1
                break
        return outputs


def how_it_ends(last: int) -> FinishReason:
    """Why a reply ends with its token ``last``."""
    return (FinishReason.LENGTH, FinishReason.ERROR, FinishReason.ABORT)[last % 3]
