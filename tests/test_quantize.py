"""From a float checkpoint to a quantised one: what is written, read back, resumed and refused."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
import types
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import quantize as script
from flax import nnx

from jaxdeploy import QuantConfig, Response, TurbomindEngineConfig, pipeline
from jaxdeploy.bundled import bundled_model
from jaxdeploy.checkpoint import writing
from jaxdeploy.checkpoint.kv_parameters import read_kv_parameters
from jaxdeploy.checkpoint.marker import NAME, read_marker
from jaxdeploy.checkpoint.quantized import expand_quantized
from jaxdeploy.checkpoint.source import read_hf_config
from jaxdeploy.checkpoint.tensors import open_checkpoint
from jaxdeploy.checkpoint.writing import put_json, put_tensors
from jaxdeploy.cli import main
from jaxdeploy.compress.evaluate import load_decoder, perplexity
from jaxdeploy.compress.passage import Passage
from jaxdeploy.compress.quantize import quantize
from jaxdeploy.compress.report import Report
from jaxdeploy.compress.texts import OWN_TEXT
from jaxdeploy.errors import CheckpointError, JaxdeployError
from jaxdeploy.files.atomic import put_file
from jaxdeploy.models.cache_layout import HeadsLayout
from jaxdeploy.models.families import llama
from jaxdeploy.models.linears import weight_at
from jaxdeploy.models.quantized import Int4Weight, Int8Weight
from jaxdeploy.models.registry import FAMILIES, family_of
from jaxdeploy.models.weights import ParamPath, decoder_weights, less
from pallas_kernels.w4a16_matmul.packing import unpack
from tests.selection import every_other
from tests.tiny_models import Array

HF: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "dtype": "bfloat16",
    "hidden_size": 64,
    "intermediate_size": 128,
    "max_position_embeddings": 256,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "vocab_size": 1024,
}
SETTINGS: dict[str, Any] = {"calib_samples": 8, "calib_seqlen": 32, "eval_samples": 4}
LAYOUTS = [HeadsLayout(2, 16, 16)] * 3

METHODS = ("rtn", "awq", "gptq", "smooth_quant")


def write_model(folder: Path, hf: dict[str, Any] = HF) -> Path:
    """A random checkpoint with the bundled model's tokenizer."""
    folder.mkdir(parents=True)
    random, tensors = np.random.default_rng(1), {}
    for source in family_of(hf).weights(family_of(hf).model_config(hf)).values():
        for name, shape in zip(source.names, source.shapes, strict=True):
            value = random.standard_normal(shape)
            value = value / np.sqrt(shape[-1]) if len(shape) > 1 else 1 + 0.1 * value
            tensors[name] = value.astype(jnp.bfloat16)
    put_tensors(folder / "model.safetensors", tensors)
    put_json(folder / "config.json", hf)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(Path(bundled_model()) / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("float") / "model")


def run(model: Path, work_dir: Path, **settings: Any) -> Report:
    return quantize(model, QuantConfig(**{**SETTINGS, "work_dir": str(work_dir), **settings}))


@pytest.fixture(scope="module")
def written(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Report]]:
    """Every method's result, with the parameters that the run itself went on with."""
    root = tmp_path_factory.mktemp("quantised")
    return {method: (root / method, run(model, root / method, method=method)) for method in METHODS}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the report, which tells the time."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if "report" not in file.name}


# What is written


@pytest.mark.parametrize("method", METHODS)
def test_the_folder_is_a_checkpoint(written: dict[str, tuple[Path, Report]], method: str) -> None:
    folder, report = written[method]
    assert not folder.with_name(f"{folder.name}.partial").exists()
    names = {file.name for file in folder.iterdir()}
    assert {"config.json", "model.safetensors.index.json", "tokenizer.json", "quant_report.json"} <= names
    assert not [name for name in names if name.startswith("layer-") or name == "run.json"]
    assert len(report.linears) == 3 * 4
    assert all(0 < linear.output_error < 0.1 for linear in report.linears)
    assert report.quality is not None
    assert 0 < report.quality.kl < 0.2
    assert report.bytes_after < report.bytes_before
    assert json.loads((folder / "quant_report.json").read_text())["schema"] == "quant_report/1"


def parameters_of_a_run(monkeypatch: pytest.MonkeyPatch) -> dict[ParamPath, Array]:
    """The parameters that the next run goes on with, filled in as it runs."""
    used: dict[ParamPath, Array] = {}
    advance = Passage._advance

    def note(self: Passage, index: int, forward: Any, floats: Any, params: Any) -> None:
        used.update({("layers", index, *path): np.asarray(value) for path, value in params.items()})
        advance(self, index, forward, floats, params)

    monkeypatch.setattr(Passage, "_advance", note)
    return used


@pytest.mark.parametrize("method", METHODS)
def test_read_back(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """The engine's integers are worth, bit for bit, what the run computed with; logits follow."""
    used = parameters_of_a_run(monkeypatch)
    run(model, tmp_path / "out", method=method, eval_samples=0)
    hf, files = read_hf_config(tmp_path / "out"), open_checkpoint(tmp_path / "out")
    table = expand_quantized(family_of(hf).weights(family_of(hf).model_config(hf)), files, hf["quantization_config"])
    for path, value in used.items():
        source = table[path]
        read = source.assemble([files[name].read() for name in source.names])
        np.testing.assert_array_equal(read.astype(np.float32), value, err_msg=str(path))
    for path, value in held_values(load_decoder(tmp_path / "out")).items():
        np.testing.assert_array_equal(value, used[path].reshape(value.shape), err_msg=str(path))


def offset_family() -> types.ModuleType:
    """A made-up family whose norms are stored as the scale less 1, like Gemma's."""
    family = types.ModuleType("offset_family")
    norm = partial(less, 1.0)
    vars(family).update(
        model_config=llama.model_config, weights=lambda config: decoder_weights(config, llama.NAMES, norm)
    )
    return family


def test_norms_that_are_stored_with_an_offset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run computes with what its files hold: folded scales are rounded in the form in which they are stored."""
    monkeypatch.setitem(FAMILIES, "OffsetForCausalLM", "offset_family")
    monkeypatch.setitem(sys.modules, "offset_family", offset_family())
    hf = {**HF, "architectures": ["OffsetForCausalLM"], "num_hidden_layers": 1}
    model = write_model(tmp_path / "model", hf)
    norm = "model.layers.0.input_layernorm.weight"
    tensors = {name: np.array(ref.read()) for name, ref in open_checkpoint(model).items()}
    put_tensors(model / "model.safetensors", {**tensors, norm: tensors[norm] - tensors[norm].dtype.type(1)})
    used = parameters_of_a_run(monkeypatch)
    run(model, tmp_path / "out", method="awq", search_scale=False, eval_samples=0)
    path = ("layers", 0, "attention_norm", "scale")
    stored = open_checkpoint(tmp_path / "out")[norm].read()
    assert stored.dtype == jnp.bfloat16
    np.testing.assert_array_equal(stored.astype(np.float32) + 1, used[path])
    assert np.abs(used[path] - np.array(tensors[norm], np.float32)).max() > 0.01, "something was folded"
    decoder = load_decoder(tmp_path / "out", dtype="bfloat16")
    scale = decoder.layers[0].attention_norm.scale[...]
    assert scale.dtype == jnp.float32
    np.testing.assert_array_equal(np.asarray(scale), used[path])
    x = np.random.default_rng(0).standard_normal((4, 64)).astype(jnp.bfloat16)
    wide = x.astype(np.float32)
    expected = wide / np.sqrt(np.mean(wide**2, axis=1, keepdims=True) + 1e-5) * used[path]
    np.testing.assert_array_equal(decoder.layers[0].attention_norm(jnp.asarray(x)), expected.astype(jnp.bfloat16))
    normed, total = decoder.layers[0].attention_norm.added(jnp.asarray(x), jnp.zeros_like(x))
    np.testing.assert_array_equal(normed, expected.astype(jnp.bfloat16))
    np.testing.assert_array_equal(total, x)


def held_values(decoder: Any) -> dict[ParamPath, Array]:
    """The weights [K, N] that the decoder's integers stand for; there are no other weights in its layers."""
    values: dict[ParamPath, Array] = {}
    for index, layer in enumerate(decoder.layers):
        for spec in layer.linears():
            weight = weight_at(layer, spec.path)
            assert isinstance(weight, Int4Weight | Int8Weight)
            values["layers", index, *spec.path] = value_of(weight)
    return values


def value_of(weight: Int4Weight | Int8Weight) -> Array:
    if isinstance(weight, Int8Weight):
        q, scales = np.asarray(weight.values[...], np.float32), np.asarray(weight.scales[...])
        product: Array = (q.reshape(-1, q.shape[-1]) * scales.reshape(-1, 1)).T
        return product
    packed = np.asarray(weight.packed[...])
    q, scales, zeros = unpack(packed.reshape(*packed.shape[:2], -1))
    repeat = partial(np.repeat, repeats=len(q) // len(scales), axis=0)
    value: Array = (q.astype(np.float32) - repeat(zeros)) * repeat(scales).astype(np.float32)
    return value[: weight.inputs]


def test_the_report_measures_what_the_engine_loads(
    model: Path, written: dict[str, tuple[Path, Report]], monkeypatch: pytest.MonkeyPatch
) -> None:
    held_out: list[Array] = []
    init = Passage.__init__

    def note(self: Passage, *args: Any) -> None:
        held_out.append(args[4].held_out)
        init(self, *args)

    monkeypatch.setattr(Passage, "__init__", note)
    run(model, written["awq"][0], overwrite=True)
    for method in METHODS:
        folder, report = written[method]
        assert report.quality is not None
        measured = perplexity(load_decoder(folder), held_out[0]).ppl
        np.testing.assert_allclose(measured, report.quality.ppl_after, rtol=2e-4)
        assert abs(measured / report.quality.ppl_before - 1) > 1e-3 or method == "smooth_quant"


@pytest.mark.parametrize("layout", ["gptq_v2", "compressed-tensors"])
def test_other_layouts(model: Path, tmp_path: Path, layout: str) -> None:
    """Another layout holds the same weights."""
    run(model, tmp_path / "a", method="rtn", format=layout, w_sym=False, eval_samples=0)
    run(model, tmp_path / "b", method="rtn", format="awq", eval_samples=0)
    one, other = (held_values(load_decoder(tmp_path / name)) for name in "ab")
    for path, value in one.items():
        np.testing.assert_array_equal(value, other[path])


def test_act_order_on_disk(model: Path, tmp_path: Path) -> None:
    """Groups of scattered inputs: ``g_idx`` is written, and read back as an order of inputs."""
    settings = {"method": "gptq", "static_groups": False, "w_group_size": 32, "eval_samples": 0}
    run(model, tmp_path / "out", **settings, calib_samples=32)  # with less, rounding to nearest wins
    assert read_hf_config(tmp_path / "out")["quantization_config"]["desc_act"] is True
    weight = load_decoder(tmp_path / "out").layers[1].mlp.down
    assert isinstance(weight, Int4Weight)
    assert weight.order is not None
    assert sorted(np.asarray(weight.order[...])) == list(range(128))


def test_modules_that_stay_float(model: Path, tmp_path: Path) -> None:
    report = run(model, tmp_path / "out", method="rtn", modules_to_not_convert=["self_attn.k_proj"], eval_samples=0)
    assert set(report.kept_float) == {f"self_attn.{name}_proj" for name in "qkv"}
    decoder = load_decoder(tmp_path / "out")
    assert isinstance(decoder.layers[0].attention.wqkv, nnx.Param)
    assert isinstance(decoder.layers[0].mlp.down, Int4Weight)


def test_widths_that_no_group_divides(tmp_path: Path) -> None:
    """As in stories260K: they stay float, by name; the others get the largest group that divides them."""
    odd = write_model(tmp_path / "odd", {**HF, "intermediate_size": 172, "num_hidden_layers": 1})
    report = run(odd, tmp_path / "out", method="rtn")
    assert {linear.linear: linear.group_size for linear in report.linears} == {"wqkv": 64, "wo": 64}
    assert "172" in report.kept_float["mlp.down_proj"]
    config = read_hf_config(tmp_path / "out")["quantization_config"]
    assert config["group_size"] == 64
    assert {"mlp.down_proj", "mlp.gate_proj", "mlp.up_proj"} <= set(config["modules_to_not_convert"])
    assert np.isfinite(perplexity(load_decoder(tmp_path / "out"), np.ones((1, 8), np.int32)).ppl)


def test_calibrated_kv_parameters(model: Path, tmp_path: Path) -> None:
    """``calibrate`` leaves the weights alone, and writes ranges that the engine takes for ``quant_policy`` 4."""
    run(model, tmp_path / "out", method="calibrate")
    before, after = open_checkpoint(model), open_checkpoint(tmp_path / "out")
    for name, ref in before.items():
        np.testing.assert_array_equal(after[name].read(), ref.read())
    parameters = read_kv_parameters(tmp_path / "out", LAYOUTS)
    assert parameters is not None
    assert all((ranges[..., 0] > 0).all() for ranges in parameters)
    run(model, tmp_path / "four", method="calibrate", kv_bits=4)
    assert read_kv_parameters(tmp_path / "four", LAYOUTS) is None, "there quant_policy 4 is to mean int4"


def test_calibrate_beside_the_model(model: Path, tmp_path: Path) -> None:
    """The command of LMDeploy's documents adds its files to the folder of the model and touches no other."""
    own = tmp_path / "own"
    shutil.copytree(model, own)
    (own / "README.md").write_text("a model")
    before = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in own.iterdir()}
    flags = ["--calib-samples", "8", "--calib-seqlen", "32", "--eval-samples", "4"]
    command = ["lite", "calibrate", str(own), "--work-dir", str(own), *flags]
    assert main(command) == 0
    parameters = read_kv_parameters(own, LAYOUTS)
    assert parameters is not None
    assert {
        file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in own.iterdir() if file.name in before
    } == before
    added = {file.name for file in own.iterdir()} - before.keys()
    assert added == {NAME, *read_marker(own).files}
    assert main(command) == 2, "an earlier run is replaced only if that is asked for"
    assert main([*command, "--overwrite", "--kv-bits", "4"]) == 0
    assert read_kv_parameters(own, LAYOUTS) is None, (
        "parameters of the earlier run would make quant_policy 4 mean 8 bits"
    )
    assert before.keys() <= {file.name for file in own.iterdir()}


@pytest.mark.slow
def test_three_bits(model: Path, tmp_path: Path) -> None:
    """GPTQ's layout has 3 bits; AWQ's has not: the result is only measured."""
    run(model, tmp_path / "gptq", method="gptq", w_bits=3)
    assert read_hf_config(tmp_path / "gptq")["quantization_config"]["bits"] == 3
    assert isinstance(load_decoder(tmp_path / "gptq").layers[0].mlp.down, Int4Weight)
    report = run(model, tmp_path / "awq", method="awq", w_bits=3)
    assert report.quality is not None
    assert any("no layout holds awq at 3 bits" in note for note in report.notes)
    assert not list(tmp_path.glob("awq*"))


@pytest.mark.parametrize(
    "method", ["gptq", *(pytest.param(name, marks=pytest.mark.slow) for name in METHODS if name != "gptq")]
)
def test_without_data(model: Path, tmp_path: Path, method: str) -> None:
    report = run(model, tmp_path / method, method=method, calib_samples=0)
    assert report.quality is not None
    assert 0 < report.quality.kl < 0.2
    assert any("without data" in note for note in report.notes)


@pytest.mark.slow
def test_several_devices(model: Path, tmp_path: Path, written: dict[str, tuple[Path, Report]]) -> None:
    """Shared work gives the same result, but for the order of sums."""
    one, four = written["gptq"][1], run(model, tmp_path / "out", method="gptq", tp=4)
    assert one.quality is not None
    assert four.quality is not None
    np.testing.assert_allclose(four.quality.ppl_before, one.quality.ppl_before, rtol=1e-5)
    np.testing.assert_allclose(four.quality.kl, one.quality.kl, rtol=0.2)
    ours, theirs = ([linear.output_error for linear in report.linears] for report in (four, one))
    np.testing.assert_allclose(ours, theirs, rtol=0.2)


@pytest.mark.parametrize("method", every_other(METHODS))
def test_chat_with_the_result(written: dict[str, tuple[Path, Report]], method: str) -> None:
    """The exercise of every LMDeploy user."""
    model_format = {"rtn": "awq"}.get(method, method)
    config = TurbomindEngineConfig(model_format=model_format, cache_max_entry_count=0.4, session_len=64, warmup=False)
    with pipeline(str(written[method][0]), config) as pipe:
        reply = pipe("Hello", max_new_tokens=4, do_preprocess=False, ignore_eos=True)
    assert isinstance(reply, Response)
    assert reply.generate_token_len == 4


@pytest.mark.slow
def test_the_bundled_model_is_measured_on_its_own_text(tmp_path: Path) -> None:
    """Without a data set, as a new user does it."""
    report = quantize(bundled_model(), QuantConfig(method="rtn", calib_seqlen=512, work_dir=str(tmp_path / "out")))
    assert report.calibration == "the model's own text"
    assert report.quality is not None
    assert report.quality.ppl_before < 2
    assert report.quality.greedy_same > 0.9
    assert (tmp_path / "out" / OWN_TEXT).exists(), "the result is measured on the same text"


# Killed and resumed


class KilledError(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("method", ["awq", "gptq"])
@pytest.mark.parametrize("writes", [2, 5, *(pytest.param(count, marks=pytest.mark.slow) for count in (1, 4, 7))])
def test_killed_and_resumed(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    written: dict[str, tuple[Path, Report]],
    method: str,
    writes: int,
) -> None:
    """Killed after so many files, a run goes on and ends as an uninterrupted one."""
    count = 0
    put = put_file

    def dying(file: Path, write: Any) -> None:
        nonlocal count
        count += 1
        if count > writes:
            file.with_name(f".{file.name}.tmp").write_bytes(b"half")
            raise KilledError
        put(file, write)

    with monkeypatch.context() as patched:
        patched.setattr(writing, "put_file", dying)
        with pytest.raises(KilledError):
            run(model, tmp_path / "out", method=method)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial" / "config.json").exists()
    quantized: list[int] = []
    begin = Passage._quantized

    def noted(self: Passage, index: int, *args: Any) -> Any:
        quantized.append(index)
        return begin(self, index, *args)

    monkeypatch.setattr(Passage, "_quantized", noted)
    report = run(model, tmp_path / "out", method=method)
    assert quantized == list(range((writes - 1) // 2, 3)), "layers that were done are not done again"
    folder, uninterrupted = written[method]
    assert contents(tmp_path / "out") == contents(folder)
    assert report.linears == uninterrupted.linears
    assert report.quality == uninterrupted.quality


def test_another_run_starts_afresh(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another run left behind is not mixed in."""
    layer = Passage.layer

    def dying(self: Passage, index: int) -> None:
        if index == 1:
            raise KilledError
        layer(self, index)

    with monkeypatch.context() as patched:
        patched.setattr(Passage, "layer", dying)
        with pytest.raises(KilledError):
            run(model, tmp_path / "out", method="rtn")
    assert list((tmp_path / "out.partial").glob("*.safetensors"))
    run(model, tmp_path / "out", method="rtn", w_group_size=32)
    found = json.loads((tmp_path / "out" / "quant_report.json").read_text())["linears"]
    assert [linear["group_size"] for linear in found] == [32] * 12


def test_other_weights_start_afresh(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer of the old weights is not joined with layers of new ones."""
    mine = shutil.copytree(model, tmp_path / "mine")

    def dying(self: Passage, index: int) -> None:
        raise KilledError

    monkeypatch.setattr(Passage, "layer", dying)
    runs = []
    for changed in (0, 0, 1):
        (weights,) = mine.glob("*.safetensors")
        os.utime(weights, (changed, changed))
        with pytest.raises(KilledError):
            run(mine, tmp_path / "out", method="rtn")
        runs.append(read_marker(tmp_path / "out.partial").run)
    assert runs[0] == runs[1] != runs[2]


# Bad input


def refused(tmp_path: Path, model: Path, match: str, **settings: Any) -> None:
    with pytest.raises(JaxdeployError, match=match):
        run(model, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("data", "match"),
    [(b"", "holds no text"), (b"short", "give a longer text"), (b"\x00\xff" * 999, "calib_dataset=.*text")],
    ids=["empty", "short", "binary"],
)
def test_calibration_file(model: Path, tmp_path: Path, data: bytes, match: str) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes(data)
    refused(tmp_path, model, match, calib_dataset=str(file))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"w_bits": 8}, "w_bits=8 is for smooth_quant"),
        ({"w_bits": 5}, "w_bits=5 is not one of 3, 4, 8"),
        ({"w_group_size": 48}, "w_group_size=48 is not one of"),
        ({"format": "gptq"}, "format=gptq cannot hold awq at 4 bits; choose one of awq, compressed-tensors"),
        ({"method": "rtn", "w_bits": 3, "format": "awq"}, "format=awq cannot hold rtn at 3 bits"),
        ({"modules_to_not_convert": ["q_proj", "o_proj", "mlp"]}, "leaves nothing to quantise"),
        ({"modules_to_not_convert": ["nothing_like_it"]}, "modules_to_not_convert=.*nothing_like_it"),
        ({"calib_dataset": "no/such/file.txt"}, "calib_dataset="),
        ({"tp": 99}, "tp=99"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit(model: Path, tmp_path: Path, settings: dict[str, Any], match: str) -> None:
    refused(tmp_path, model, match, **settings)


def test_quantised_already(tmp_path: Path, written: dict[str, tuple[Path, Report]]) -> None:
    refused(tmp_path, written["awq"][0], "is quantised already .awq.; give the float model")


@pytest.mark.parametrize("fails", [3, 8, 10])
def test_a_full_disk(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: int) -> None:
    """One line, nothing that looks finished; with room again, the run goes on."""
    put, count = put_file, 0

    def full(file: Path, write: Any) -> None:
        nonlocal count
        count += 1
        if count == fails:
            raise OSError(errno.ENOSPC, "No space left on device")
        put(file, write)

    with monkeypatch.context() as patched:
        patched.setattr(writing, "put_file", full)
        refused(tmp_path, model, "work_dir=.* cannot be written .No space left on device.; make room", method="rtn")
    assert not (tmp_path / "out.partial" / "config.json").exists()
    run(model, tmp_path / "out", method="rtn")
    assert (tmp_path / "out" / "config.json").exists()


def test_no_room_from_the_beginning(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    refused(tmp_path, model, "of room, .* are needed", method="rtn")


@pytest.mark.parametrize("method", ["rtn", "awq", "gptq", "smooth_quant"])
def test_weights_that_are_not_finite(model: Path, tmp_path: Path, method: str) -> None:
    """The layer is named, and nothing that looks finished is left."""
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    tensors = {name: np.array(ref.read()) for name, ref in open_checkpoint(model).items()}
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = np.inf
    put_tensors(broken / "model.safetensors", tensors)
    with pytest.raises(CheckpointError, match=r"layers\.1"):
        run(broken, tmp_path / "out", method=method)
    assert not (tmp_path / "out").exists()


def test_activations_that_the_checkpoints_dtype_cannot_hold(model: Path, tmp_path: Path) -> None:
    large = tmp_path / "large"
    shutil.copytree(model, large)
    tensors = {name: np.array(ref.read()).astype(np.float16) for name, ref in open_checkpoint(model).items()}
    tensors["model.layers.1.mlp.down_proj.weight"] *= np.float16(30000)
    put_tensors(large / "model.safetensors", tensors)
    with pytest.raises(CheckpointError, match=r"layers\.1: .* above 65504, which float16 cannot hold"):
        run(large, tmp_path / "out", method="rtn")


# The command


def test_the_command(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--calib-samples", "8", "--calib-seqlen", "32", "--eval-samples", "2", "--w-group-size", "32"]
    assert main(["lite", "rtn", str(model), "--work-dir", str(tmp_path / "out"), *flags]) == 0
    shown = capsys.readouterr()
    assert "perplexity" in shown.out
    assert "3/3" in shown.err
    assert main(["lite", "rtn", str(model), "--work-dir", str(tmp_path / "out"), *flags]) == 2
    assert "error: work_dir=" in capsys.readouterr().err
    assert main(["lite", "auto_awg", str(model)]) == 2
    assert "method='auto_awg' is unknown" in capsys.readouterr().err


@pytest.mark.parametrize("name", every_other(sorted(path.stem for path in Path("configs/quant").glob("*.yaml"))))
def test_ready_configs(model: Path, tmp_path: Path, name: str) -> None:
    """Each file that comes with jaxdeploy does what its name says."""
    small = [f"model={model}", f"work_dir={tmp_path / 'out'}", "calib_samples=8", "calib_seqlen=32", "eval_samples=2"]
    assert script.main(["--config", f"configs/quant/{name}.yaml", *small]) == 0
    assert (tmp_path / "out" / "config.json").exists()


def test_bad_arguments_of_the_script(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["work_dir=x"], "model is not given"),
        (["model=x", "nonsense"], "argument='nonsense' must read key=value"),
        (["model=x", "w_bit=3"], "w_bit=.* is not a setting of QuantConfig; the nearest one is w_bits"),
    ):
        assert script.main(["--config", "configs/quant/rtn-w4g128.yaml", *arguments]) == 2
        assert re.search(message, capsys.readouterr().err)
