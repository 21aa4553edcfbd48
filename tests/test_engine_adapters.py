"""Adapters in the engine: any mixture in a batch gives each request what its adapter, merged, would give."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdeploy.checkpoint.adapter import AdapterWeights
from jaxdeploy.checkpoint.source import read_hf_config
from jaxdeploy.config import EngineConfig
from jaxdeploy.engine.device.adapter_reader import AdapterReader
from jaxdeploy.engine.device.buckets import StepShape
from jaxdeploy.engine.device.inputs import padding_inputs
from jaxdeploy.engine.device.runner import ModelRunner
from jaxdeploy.engine.front.build import build_engine
from jaxdeploy.engine.front.engine import Engine
from jaxdeploy.engine.scheduling.adapters import Adapters
from jaxdeploy.engine.scheduling.sequence import Sequence
from jaxdeploy.engine.speculation.speculation import Speculation
from jaxdeploy.errors import CheckpointError, ConfigError, NonFiniteError, UnknownAdapterError
from jaxdeploy.messages import FinishReason, Request, SamplingParams
from jaxdeploy.models.decoder import decoder_from
from jaxdeploy.models.lora import LowRank, bank_of
from jaxdeploy.parallel.mesh import make_mesh
from tests.test_merge import write_base
from tests.tiny_adapters import ALL, LINEARS, QKV, TinyAdapter
from tests.tiny_models import (
    BLOCK_SIZE,
    CONFIG,
    IN_A_ROW,
    SHAPES,
    SHAPES_IN_A_ROW,
    SLOTS,
    TABLE_LENGTH,
    VOCAB,
    LastingRunner,
    lasting_runner,
    live_arrays,
    outputs_of,
    params,
    prompt,
    run,
    runner_of,
    tiny_engine,
)

Array = np.ndarray[Any, Any]
DEVICE_SLOTS, MAX_RANK, DRAFTS = 4, 8, 2
TWO_SHAPES = [SHAPES[2], SHAPES[4]]
"""One to prefill, one to decode: few programs are compiled."""
TARGETS = (ALL, ("q_proj", "v_proj"), (*QKV, "lm_head"), ("down_proj", "o_proj"))


def tiny(index: int) -> TinyAdapter:
    """Others have other targets and ranks."""
    return TinyAdapter(
        seed=index, targets=TARGETS[index % 4], rank=1 + index % MAX_RANK, ranks={"v_proj": 1 + (index + 3) % MAX_RANK}
    )


@functools.cache
def content(index: int) -> tuple[Any, ...]:
    """What a slot gets of an adapter that is made here and now."""
    made, modules = tiny(index), {}
    tensors, prefix = made.tensors(), "base_model.model."
    for module in made.modules():
        a, b = (tensors[f"{prefix}{module}.lora_{side}.weight"].T.copy() for side in "AB")
        rank = made.ranks.get(module.rpartition(".")[2], made.rank)
        modules[module] = LowRank(a, b * np.float32(made.alpha / rank))
    return reader(1).content(AdapterWeights(Path(str(index)), modules))


@functools.cache
def reader(tp: int) -> AdapterReader:
    sizes: dict[str, Any] = {"slots": DEVICE_SLOTS, "max_rank": MAX_RANK, "dtype": jnp.dtype(jnp.float32)}
    return AdapterReader(LINEARS, bank_of(CONFIG, LINEARS, make_mesh(tp), **sizes, head=True), MAX_RANK, {})


@functools.cache
def runner(tp: int = 1, bits: int | None = None) -> ModelRunner:
    bank = reader(tp).bank
    return runner_of(LastingRunner, tp, adapters=(bank, bank.zeros()), bits=bits)


def engine_with(adapters: Iterable[int], *, tp: int = 1, bits: int | None = None, **options: Any) -> Engine:
    """An engine with the adapters of these numbers, by the names "0", "1" …"""
    held = Adapters(DEVICE_SLOTS)
    for index in adapters:
        held.load(str(index), content(index))
    sizes = {"shapes": TWO_SHAPES, **options}
    return tiny_engine(runner=runner(tp, bits), adapters=held, reader=reader(tp), **sizes)


def asked(name: str, length: int, adapter: int | None, count: int = 6, **more: Any) -> Request:
    sampling = SamplingParams(**{"max_new_tokens": count, **more.pop("sampling", {})})
    return Request(name, prompt(length), sampling, adapter=None if adapter is None else str(adapter), **more)


@functools.cache
def merged(index: int | None) -> dict[Any, jax.Array]:
    """The model's parameters with an adapter in them."""
    held = dict(params())
    for path, linear in LINEARS.items():
        deltas = [] if index is None else [tiny(index).delta(module).astype(np.float32) for module in linear.modules]
        if any(delta.any() for delta in deltas):
            held[path] = held[path] + np.moveaxis(linear.outputs.join(deltas), -1, 0).reshape(held[path].shape)
    return held


_logits = jax.jit(lambda held, tokens: decoder_from(CONFIG, held)(tokens))


def truth(length: int, adapter: int | None, count: int = 6) -> list[int]:
    """Greedy tokens of a decoder with the adapter merged, every one from the whole sequence."""
    tokens = list(prompt(length))
    for _ in range(count):
        padded = np.zeros((1, 64), np.int32)
        padded[0, : len(tokens)] = tokens
        tokens.append(int(np.asarray(_logits(merged(adapter), padded))[0, len(tokens) - 1].argmax()))
    return tokens[length:]


def settled(engine: Engine) -> None:
    """Nothing is held any more."""
    engine.scheduler.adapters.check()
    engine.scheduler.prefixes.check()
    assert engine.scheduler.adapters.used == 0
    assert engine.scheduler.blocks.active == 0


def test_a_mixed_batch_is_what_merged_models_say() -> None:
    """Four adapters in the four slots, several sequences of each, and some without."""
    adapters = [None, 0, 1, 2, 3, None, 3, 1, 0]
    engine = engine_with(range(4))
    lengths = [3 + 5 * row for row in range(len(adapters))]
    items = [asked(str(row), *pair) for row, pair in enumerate(zip(lengths, adapters, strict=True))]
    replies = run(engine, items)
    for row, (length, adapter) in enumerate(zip(lengths, adapters, strict=True)):
        assert replies[str(row)] == truth(length, adapter), (length, adapter)
    assert replies["1"] != truth(lengths[1], None)
    settled(engine)


def test_eight_adapters_take_turns_in_four_slots() -> None:
    """Round-robin, as many requests as there are rows; each is what it is alone."""
    engine = engine_with(range(8))
    items = [asked(str(row), 9 + row, row % 8, sampling={"temperature": row % 2, "seed": row}) for row in range(SLOTS)]
    together = run(engine, items)
    alone = {item.request_id: run(engine_with(range(8)), [item])[item.request_id] for item in items}
    assert together == alone
    assert together["2"] == truth(11, 2)
    settled(engine)


@pytest.mark.slow
def test_a_hundred_adapters_leak_nothing() -> None:
    engine = engine_with(range(100))
    run(engine, [asked("first", 5, 0)])
    before = live_arrays()
    replies = run(engine, [asked(str(index), 5 + index % 7, index, 2) for index in range(100)])
    assert live_arrays() == before
    settled(engine)
    for index in range(0, 100, 9):
        assert replies[str(index)] == truth(5 + index % 7, index, 2)
    assert engine.scheduler.preemptions == 0


def test_prefixes_are_shared_within_an_adapter_only() -> None:
    engine = engine_with(range(2))
    cached = []
    for row, adapter in enumerate((None, 0, 1, 0, None, 1)):
        outputs = outputs_of(engine, [asked(str(row), 3 * BLOCK_SIZE + 1, adapter, 3)])[str(row)]
        cached.append(outputs[0].cached_tokens)
        assert [token for output in outputs for token in output.token_ids] == truth(49, adapter, 3)
    assert cached == [0, 0, 0, 48, 48, 48]
    engine.scheduler.adapters.load("0", content(2))
    assert outputs_of(engine, [asked("new", 49, 0, 1)])["new"][0].cached_tokens == 0
    settled(engine)


def test_sessions_go_on_with_the_same_adapter_only() -> None:
    for second, expected in ((0, 13), (1, 0), (None, 0)):
        engine = engine_with(range(2), sharing=True)
        tokens = [*prompt(10), *run(engine, [asked("a", 10, 0, 4, session_id="s")])["a"]]
        follows = Request("b", (*tokens, 5), SamplingParams(max_new_tokens=1), session_id="s", adapter=_name(second))
        assert outputs_of(engine, [follows])["b"][0].cached_tokens == expected
        settled(engine)


def _name(adapter: int | None) -> str | None:
    return None if adapter is None else str(adapter)


def test_preempted_sequences_come_back_with_their_adapter() -> None:
    items = [asked(str(row), 30 + row, row % 5, 12) for row in range(6)]
    engine = engine_with(range(5), blocks=10)
    replies = run(engine, items)
    assert engine.scheduler.preemptions > 0
    assert replies == run(engine_with(range(5)), items)
    assert replies["4"] == truth(34, 4, 12)
    settled(engine)


@pytest.mark.slow
@pytest.mark.parametrize("tp", [4, 2])
def test_several_devices(tp: int) -> None:
    items = [asked(str(row), 20 + row, adapter) for row, adapter in enumerate((None, 0, 1, 2, 3))]
    assert run(engine_with(range(4), tp=tp), items) == run(engine_with(range(4)), items)


def test_a_quantized_cache() -> None:
    items = [asked(str(adapter), 20, adapter) for adapter in range(6)]
    together = run(engine_with(range(6), bits=8), items)
    assert together == {item.request_id: run(engine_with(range(6), bits=8), [item])[item.request_id] for item in items}
    assert len({*map(tuple, together.values())}) == len(items)


def test_several_tokens_in_a_launch() -> None:
    items = [asked(str(row), 20 + row, adapter, 3 * IN_A_ROW) for row, adapter in enumerate((1, 0, None))]
    shapes = [SHAPES_IN_A_ROW[-1], *TWO_SHAPES]
    engine = engine_with(range(2), shapes=shapes, decode_steps=IN_A_ROW)
    assert run(engine, items) == run(engine_with(range(2)), items)
    assert engine.stats.steps < 9


class _Guessing:
    """Says that one token comes again and again, which some replies do for a while."""

    def propose(self, room: Mapping[Sequence, int]) -> Mapping[Sequence, tuple[int, ...]]:
        return {sequence: (sequence.token_ids[-1],) * min(most, DRAFTS) for sequence, most in room.items()}

    def warm_up(self, progress: Any) -> None:
        raise NotImplementedError

    def clear_blocks(self, blocks: list[int]) -> None:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


def test_drafts_are_verified_with_the_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head's pair among them (adapter 2)."""
    items = [asked(str(row), 20 + row, adapter, 8) for row, adapter in enumerate((1, 2, None))]
    speculation = Speculation(_Guessing(), DRAFTS)
    monkeypatch.setattr(speculation.gate, "is_open", lambda batch: True)
    shapes = [*TWO_SHAPES, replace(SHAPES[2], drafts=DRAFTS)]
    engine = engine_with(range(3), shapes=shapes, speculation=speculation)
    assert run(engine, items) == {str(row): truth(20 + row, adapter, 8) for row, adapter in enumerate((1, 2, None))}
    assert engine.stats.speculation.drafts > 10
    settled(engine)


def test_prompts_are_read_with_the_adapter() -> None:
    """The head's pair among them (adapter 2)."""
    engine = engine_with(range(3))
    items = [asked(str(row), 12, adapter, 1, sampling={"prompt_logprobs": 0}) for row, adapter in enumerate((2, None))]
    outputs = outputs_of(engine, items)
    for row, adapter in enumerate((2, None)):
        reading = outputs[str(row)][-1].prompt
        assert reading is not None
        padded = np.zeros((1, 64), np.int32)
        padded[0, :12] = prompt(12)
        values = jax.nn.log_softmax(_logits(merged(adapter), padded)[0, :11])
        expected = np.asarray(values)[np.arange(11), prompt(12)[1:]]
        np.testing.assert_allclose([token.logprob for token in reading.logprobs], expected, rtol=0, atol=1e-4)


def test_unloading_lets_running_requests_end(tmp_path: Path) -> None:
    engine = engine_with(range(2))
    engine.add(asked("a", 10, 0))
    tokens = [token for output in engine.step() + engine.step() for token in output.token_ids]
    engine.unload_adapter("0")
    assert engine.adapters == ("1",)
    with pytest.raises(UnknownAdapterError, match="adapter='0' is not loaded; choose one of 1"):
        engine.add(asked("b", 10, 0))
    engine.load_adapter("0", tiny(5).write(tmp_path)).result(60)
    assert set(engine.adapters) == {"0", "1"}
    engine.add(asked("c", 10, 0))
    replies: dict[str, list[int]] = {"a": tokens, "c": []}
    while engine.has_work:
        for output in engine.step():
            replies[output.request_id] += output.token_ids
    assert replies == {"a": truth(10, 0), "c": truth(10, 5)}
    settled(engine)


def test_an_aborted_sequence_gives_its_slot_back() -> None:
    engine = engine_with(range(6))
    for row in range(6):
        engine.add(asked(str(row), 10, row, 50))
    for _ in range(3):
        engine.step()
    assert engine.stats.waiting == 2
    for row in range(5):
        engine.abort(str(row))
    while engine.has_work:
        outputs = engine.step()
    assert outputs[-1].finish_reason is FinishReason.LENGTH
    settled(engine)


def test_folders_that_do_not_fit(tmp_path: Path) -> None:
    engine = engine_with(range(1))
    with pytest.raises(CheckpointError, match="rank 9 is more than max_lora_rank=8"):
        engine.load_adapter("a", TinyAdapter(rank=9).write(tmp_path / "a")).result(60)
    assert engine.adapters == ("0",)
    with pytest.raises(ConfigError, match="adapter='a' cannot be loaded: there is no room"):
        tiny_engine().load_adapter("a", tmp_path / "a").result(60)
    narrow = AdapterReader(
        LINEARS, bank_of(CONFIG, LINEARS, make_mesh(1), slots=1, max_rank=8, dtype=jnp.float32), 8, {}
    )
    with pytest.raises(CheckpointError, match=r"adapts lm_head, as none did that was given at start"):
        narrow.read(TinyAdapter(targets=("lm_head",)).write(tmp_path / "head"))


def test_steps_without_adapters_are_the_programs_of_an_engine_without_any() -> None:
    inputs = padding_inputs(SHAPES[1], VOCAB, full_sampler=False)
    texts = [_lowered(one, inputs) for one in (runner(), lasting_runner(1))]
    assert texts[0] == texts[1]
    engine = engine_with(range(1))
    assert run(engine, [asked("a", 10, None)]) == run(tiny_engine(), [asked("a", 10, None)])


def _lowered(one: ModelRunner, inputs: Any) -> str:
    return str(one.lowered(inputs).as_text())


@pytest.mark.slow
def test_nothing_is_compiled_after_warm_up(caplog: pytest.LogCaptureFixture) -> None:
    bank = reader(1).bank
    fresh = runner_of(ModelRunner, adapters=(bank, bank.zeros()))
    held = Adapters(DEVICE_SLOTS)
    held.load("0", content(0))
    shape = StepShape(4, 32, TABLE_LENGTH, SLOTS)
    engine = tiny_engine(runner=fresh, adapters=held, reader=reader(1), shapes=[shape], batch=4, max_prefill=32)
    engine.warm_up()
    caplog.set_level(logging.WARNING, "jaxdeploy")
    items = [asked("a", 40, 0), asked("b", 9, None), asked("c", 9, 0, sampling={"temperature": 1.0})]
    run(engine, items)
    assert not caplog.messages
    engine.close()


def test_an_engine_from_a_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "jaxdeploy")
    base, folder = write_base(tmp_path / "base"), tiny(2).write(tmp_path / "two")
    sizes = EngineConfig(session_len=64, max_batch_size=2, max_prefill_token_num=32, block_size=16, warmup=False)
    settings = replace(sizes, adapters={"two": str(folder)}, max_loras=2)
    engine = build_engine(base, read_hf_config(base), settings)
    assert engine.adapters == ("two",)
    engine.load_adapter("three", tiny(3).write(tmp_path / "three")).result(60)
    sampling = SamplingParams(max_new_tokens=4)
    replies = run(engine, [Request(name, prompt(10), sampling, adapter=name) for name in ("two", "three")])
    assert replies["two"] != replies["three"]
    assert any("adapters: 2 slots of rank up to 16" in message for message in caplog.messages)
    engine.close()


def poisoned_engine(**options: Any) -> Engine:
    """One with an adapter "1" whose weights are finite, but too large: all that it computes is not."""
    engine = engine_with([0], **options)
    huge = jax.tree.map(lambda array: array * array.dtype.type(1e30) if array.dtype.kind == "f" else array, content(1))
    engine.scheduler.adapters.load("1", huge)
    return engine


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"bits": 8}, marks=pytest.mark.slow),
        pytest.param({"shapes": [*TWO_SHAPES, SHAPES_IN_A_ROW[-1]], "decode_steps": IN_A_ROW}, marks=pytest.mark.slow),
    ],
    ids=["floats", "int8", "in a row"],
)
def test_logits_that_are_not_finite_end_their_request_and_poison_nobody(options: dict[str, Any]) -> None:
    """The cache is so small that the next requests get the blocks at once; one request ends before its logits."""
    bits = options.get("bits")
    healthy = [asked("base", 50, None), asked("other", 20, 0, sampling={"temperature": 1.0, "seed": 3})]
    expected = run(engine_with([0], bits=bits), healthy)
    engine = poisoned_engine(blocks=TABLE_LENGTH, **options)
    for round_ in range(3):
        bad = [asked("greedy", 40, 1), asked("drawn", 33, 1, sampling={"temperature": 1.0})]
        outputs = outputs_of(engine, [*bad, *healthy])
        for name in ("greedy", "drawn"):
            (output,) = outputs[name]
            assert (output.token_ids, output.finish_reason) == ((), FinishReason.ERROR)
            assert isinstance(output.error, NonFiniteError)
        for name, tokens in expected.items():
            assert [token for output in outputs[name] for token in output.token_ids] == tokens, (round_, name)
        engine.add(asked("aborted", 100, 1))
        engine.step()
        engine.abort("aborted")
        engine.scheduler.prefixes.check()
    assert run(engine, [asked("base", 50, None)])["base"] == expected["base"]
    runner(1, bits).clear_blocks(list(range(SLOTS * TABLE_LENGTH)))  # other tests share it
