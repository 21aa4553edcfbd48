"""Grammars that crash or block the library end a worker process; other grammars still compile."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from jaxdeploy.errors import RequestError
from jaxdeploy.grammar.response_format import LARGEST, grammar_of
from jaxdeploy.server import grammars as module
from jaxdeploy.server.errors import OverloadedError
from jaxdeploy.server.grammars import WorkedGrammars

INTEGER = {"type": "json_schema", "json_schema": {"type": "integer"}}


def chained(length: int) -> dict[str, Any]:
    """A schema whose definitions refer to one another; a long chain overflows the library's stack."""
    chain = {f"a{n}": {"type": "object", "properties": {"x": {"$ref": f"#/$defs/a{n + 1}"}}} for n in range(length)}
    return {"type": "json_schema", "json_schema": {"$ref": "#/$defs/a0", "$defs": {**chain, f"a{length}": {}}}}


def endless(name: str) -> dict[str, Any]:
    """A grammar that takes the library minutes."""
    parts = " & ".join(f"/[^{chr(97 + n % 26)}]*{n}.*/" for n in range(200))
    return {"type": "grammar", "grammar": f"start: {name}\n{name}: {parts}\n"}


@pytest.mark.parametrize("form", [chained(3000), {"type": "choice", "choice": ["x" * LARGEST]}])
def test_a_grammar_that_is_too_much_is_refused_in_any_process(form: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=r"response_format does not compile within|is larger than"):
        grammar_of(form)


def test_others_go_on_beside_grammars_that_crash_or_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SECONDS", 0.3)

    async def scenario() -> None:
        grammars = WorkedGrammars()
        try:
            with pytest.raises(RequestError, match="does not compile within 2 s, 2 GiB of memory and 1 MiB of stack"):
                await grammars.of(chained(1500))
            blocked = [asyncio.ensure_future(grammars.of(endless(name))) for name in ("A", "B", "C")]
            await asyncio.sleep(0)
            assert await grammars.of(INTEGER) == grammar_of(INTEGER)
            assert not all(task.done() for task in blocked), "a small grammar comes before large ones"
            blocked[2].cancel()
            for task in blocked[:2]:
                with pytest.raises(RequestError):
                    await task
            assert json.loads(str(await grammars.of({"type": "json_object"})))
            with pytest.raises(RequestError, match="xml"):
                await grammars.of({"type": "xml"})
        finally:
            grammars.close()

    asyncio.run(scenario())


def test_a_limited_number_of_grammars_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_WAITING", 1)

    async def scenario() -> None:
        grammars = WorkedGrammars()
        try:
            tasks = [asyncio.ensure_future(grammars.of({**INTEGER, "n": n})) for n in range(4)]
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert sum(isinstance(result, OverloadedError) for result in results) == 2
        finally:
            grammars.close()

    asyncio.run(scenario())
