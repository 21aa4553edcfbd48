"""What many clients do to the front, at random, while the engine is ahead of it: no request is lost or ends twice."""

from __future__ import annotations

import asyncio
import random
import threading
from contextlib import aclosing
from typing import Any

from jaxdeploy.api.streams import Streams
from jaxdeploy.engine.front.async_engine import AsyncEngine, EngineStoppedError
from jaxdeploy.messages import FinishReason, Request, TextOptions, TextOutput
from tests.fake_engine import UNREADABLE, BurstEngine, how_it_ends
from tests.test_text_stream import cut
from tests.tiny_text import LETTERS, text_of, tiny_generator

HISTORIES = 10_000
CLIENTS = 40
"""Concurrent clients. Each uses its own few names again and again."""


def asked(names: list[str], dice: random.Random) -> list[Request]:
    """Alternatives with stop words, some of which match; one token in 50 cannot be decoded."""
    letters = LETTERS[:4]  # few, so that stop words match
    stops = tuple("".join(dice.choices(letters, k=dice.randint(1, 4))) for _ in range(dice.randint(0, 2)))
    requests = []
    for name in names:
        tokens = [10 * dice.randrange(4) + dice.randrange(4) for _ in range(dice.randint(1, 8))]
        if dice.random() < 0.02:
            tokens[dice.randrange(len(tokens))] = UNREADABLE
        requests.append(Request(name, tuple(tokens), text=TextOptions(stops, include_stop=dice.random() < 0.5)))
    return requests


def check(request: Request, outputs: list[TextOutput]) -> None:
    """A reply that was read to its end has ended once, with the text that it should have."""
    assert [output.finish_reason is not None for output in outputs] == [False] * (len(outputs) - 1) + [True]
    tokens, ending = request.prompt_token_ids, outputs[-1].finish_reason
    if UNREADABLE in tokens and ending is FinishReason.ERROR:
        return
    whole = text_of(token for token in tokens if token != UNREADABLE)
    text = "".join(output.text for output in outputs)
    if ending is FinishReason.STOP:
        assert text == cut(whole, request.text.stop_words, include_stop=request.text.include_stop)
    else:
        assert (text, ending) == (whole, how_it_ends(tokens[-1]))
    assert (outputs[-1].error is not None) == (ending is FinishReason.ERROR)


async def history(engine: AsyncEngine, names: list[str], dice: random.Random) -> None:
    """Ask, read, and maybe leave or abort on the way."""
    requests = asked(names, dice)
    leaves_after = dice.choice((None, None, None, 0, 1, 3))
    aborts_after = dice.choice((None, None, None, None, 1, 2))
    seen: dict[str, list[TextOutput]] = {item.request_id: [] for item in requests}
    count = 0
    try:
        async with aclosing(engine.generate_all(requests)) as outputs:
            async for output in outputs:
                seen[output.request_id].append(output)
                count += 1
                if count == aborts_after:
                    await engine.abort(requests[0].request_id)
                if leaves_after is not None and count > leaves_after:
                    return
    except EngineStoppedError:
        if aborts_after is None:
            raise
    else:
        for item in requests:
            check(item, seen[item.request_id])


async def client(engine: AsyncEngine, number: int, histories: int) -> None:
    dice = random.Random(number)
    for _ in range(histories):
        await history(engine, [f"{number}-{index}" for index in range(dice.choice((1, 1, 2, 3)))], dice)


def test_clients_at_random() -> None:
    fake = BurstEngine()
    generator = tiny_generator(fake)
    engine = AsyncEngine(generator)

    async def run() -> None:
        each = HISTORIES // CLIENTS
        await asyncio.gather(*(client(engine, number, each) for number in range(CLIENTS)))
        await engine.stats()  # every abort before it has been carried out

    asyncio.run(asyncio.wait_for(run(), 300))
    assert engine.healthy
    assert not (fake.has_work)
    assert not (generator._streams)
    assert not engine._streams
    assert fake.added == fake.ended >= HISTORIES
    engine.close()


def reader(streams: Streams, number: int, rounds: int) -> None:
    dice = random.Random(number)
    for _ in range(rounds):
        requests = asked([f"{number}-{index}" for index in range(dice.choice((1, 2)))], dice)
        seen: dict[str, list[TextOutput]] = {item.request_id: [] for item in requests}
        leaves_after, stopped = dice.choice((None, None, 1, 2)), False
        outputs: Any = streams.read(requests)
        for count, output in enumerate(outputs, 1):
            seen[output.request_id].append(output)
            if count == leaves_after:
                stopped = dice.random() < 0.5
                if not stopped:
                    break
                streams.stop(list(seen))
        else:
            for item in requests if not stopped else ():
                check(item, seen[item.request_id])
        outputs.close()


def test_threads_at_random() -> None:
    fake = BurstEngine()
    generator = tiny_generator(fake)
    streams, failures = Streams(generator), list[BaseException]()

    def run(number: int) -> None:
        try:
            reader(streams, number, 100)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert not (fake.has_work)
    assert not (generator._streams)
    assert not streams._boxes
    assert fake.added == fake.ended
