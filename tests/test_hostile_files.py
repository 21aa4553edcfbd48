"""Files made to exhaust memory or time, or to reach the limits of the libraries that read them: each is one line."""

from __future__ import annotations

import json
import os
import resource
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jaxdeploy.api.client import is_url
from jaxdeploy.chat.session import Conversation
from jaxdeploy.chat_template import ChatTemplate
from jaxdeploy.checkpoint import pickle_machine, pickle_reader, safetensors_reader
from jaxdeploy.checkpoint.source import read_hf_config
from jaxdeploy.checkpoint.tensors import open_checkpoint
from jaxdeploy.checkpoint.writing import put_json, put_tensors
from jaxdeploy.cli import main
from jaxdeploy.compress.texts import open_texts
from jaxdeploy.config import ServerConfig
from jaxdeploy.errors import CheckpointError, ConfigError, JaxdeployError, RequestError
from jaxdeploy.files.stored import MAX_BYTES, parse_json, shown
from jaxdeploy.models.registry import architecture_of, read_config
from jaxdeploy.server.listening import certificate
from jaxdeploy.settings import read_yaml
from jaxdeploy.tokenizer import Tokenizer, huggingface_file
from tests.fuzzed_folder import HF, VALUES, fill_byte_level
from tests.torch_zip import mapping, number, text, write_torch_file, write_zip

SECONDS = 10.0
"""CPU time of a test."""


@pytest.fixture(autouse=True)
def _quick_and_small() -> Iterator[None]:
    """Every test here ends in time, and in 300 MB more than this process had at most."""
    size, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    yield
    assert time.process_time() - start < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - size < 300_000


def one_line(error: BaseException) -> str:
    message = str(error)
    assert "\n" not in message
    assert len(message) < 1500
    return message


def complaint(name: str, value: Any) -> str:
    """The error for a field with that value; empty if it is accepted."""
    try:
        read_config({**HF, name: value})
    except JaxdeployError as error:
        return str(error)
    return ""


def test_every_field_of_a_config_may_be_wrong() -> None:
    """Each change of one field is accepted, or refused in a line."""
    complaints = {(name, str(value)): complaint(name, value) for name in HF for value in VALUES}
    assert sum(not line for line in complaints.values()) > len(HF), "null is absent for most fields"
    for (name, _), line in complaints.items():
        assert "\n" not in line or f"{name} is missing" in line
        assert len(line) < 1500


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"num_hidden_layers": 100_000}, "num_hidden_layers=100000 must lie between 1 and 1000"),
        ({"max_position_embeddings": "4096"}, "max_position_embeddings='4096' must be a whole number"),
        ({"rms_norm_eps": 1e5}, "rms_norm_eps=100000.0 must lie between 1e-12 and 0.1"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan must lie between"),
        ({"rope_theta": 1e30, "rope_scaling": None}, r"rope_theta=1e\+30 must lie between 2 and 1e\+12"),
        ({"rope_theta": -1}, "rope_theta=-1 must lie between"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "rope_scaling: factor='2' must be a number"),
        ({"rope_scaling": [1]}, r"rope_scaling=\[1\] must be an object"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings='false' must be true or false"),
        ({"head_dim": 7}, "head_dim=7 must be even"),
        ({"torch_dtype": "int4"}, "torch_dtype='int4' must be one of float32"),
    ],
)
def test_fields_out_of_range(changes: dict[str, Any], rule: str) -> None:
    with pytest.raises(CheckpointError, match=rf"^config\.json: {rule}"):
        read_config({**HF, **changes})


@pytest.mark.parametrize(
    "changes", [{"partial_rotary_factor": 0.5}, {"rope_scaling": {"type": "default", "partial_rotary_factor": 0.25}}]
)
def test_an_option_that_no_family_implements_is_refused(changes: dict[str, Any]) -> None:
    assert "partial_rotary_factor=0." in complaint(*next(iter(changes.items())))
    assert not complaint("partial_rotary_factor", 1.0)


def test_null_is_absent_and_a_whole_float_is_whole() -> None:
    plain = {name: value for name, value in HF.items() if name != "max_position_embeddings"}
    assert read_config({**HF, "max_position_embeddings": None}) == read_config(plain)
    assert read_config({**HF, "num_hidden_layers": 2.0}) == read_config(HF)


@pytest.mark.parametrize(
    ("named", "architecture"),
    [
        ({"architectures": ["LLaMAForCausalLM"]}, "LlamaForCausalLM"),
        ({"architectures": ["LLaMaForCausalLM"]}, "LlamaForCausalLM"),
        ({"architectures": None, "model_type": "llama"}, "LlamaForCausalLM"),
        ({"model_type": "internlm2"}, "InternLM2ForCausalLM"),
    ],
)
def test_old_spellings_of_architectures(named: dict[str, Any], architecture: str) -> None:
    assert architecture_of(named) == architecture


@pytest.mark.parametrize("kind", ["fifo", "folder", "loop", "device", "large"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "quantize_config.json"])
def test_what_is_no_regular_file(tmp_path: Path, kind: str, name: str) -> None:
    put_json(tmp_path / "config.json", HF)
    put_tensors(tmp_path / "model.safetensors", {})
    fill_byte_level(tmp_path, 1)
    file = tmp_path / name
    file.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    elif kind == "large":
        file.touch()
        os.truncate(file, MAX_BYTES * 100)
    else:
        file.symlink_to("/dev/zero" if kind == "device" else name)
    with pytest.raises(CheckpointError) as caught:
        read_all(tmp_path)
    assert name in one_line(caught.value)


def read_all(folder: Path) -> None:
    """Read every file of a folder. Raises ``CheckpointError`` for faults of weights too."""
    read_hf_config(folder)
    Tokenizer.load(folder)
    raise CheckpointError(open_checkpoint(folder).faults[0])


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 1_000_000,
        b'{"a":' * 500_000,
        b"[]," * 3_000_000,
        b'{"a": "\\ud83d"}',
        b"\xff",
        b"9" * 9999,
        b'{"a": 1' + b"0" * 9999,
    ],
)
def test_json_that_is_too_much(content: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"^a\.json: "):
        parse_json(content, "a.json:")


def test_values_are_shown_short() -> None:
    shared: Any = ()
    for _ in range(60):
        shared = (shared, shared)
    assert len(shown(shared)) < 2000
    assert len(shown({"a" * 10**6: ["b" * 10**6] * 1000})) < 500
    line = str(CheckpointError("x\x1b[31m" + "y" * 10**6))
    assert len(line) < 1100
    assert line.isprintable()


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [1] * 300, "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [0, 2**64], "data_offsets": [0, 0]},
        {"dtype": "F32", "shape": [2**64], "data_offsets": [0, 2**66]},
        {"dtype": "x" * 10**6, "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]},
    ],
)
def test_odd_entries_of_safetensors(tmp_path: Path, entry: dict[str, Any]) -> None:
    header = json.dumps({"x": entry}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    (fault,) = open_checkpoint(tmp_path).faults
    assert fault.startswith("model.safetensors: ")
    assert len(fault) < 1000


def test_deep_header_of_safetensors(tmp_path: Path) -> None:
    header = b'{"x":' * 100_000
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert "its header is nested too deeply" in open_checkpoint(tmp_path).faults[0]


def doubled(levels: int) -> bytes:
    """A tuple of two that hold the same, and so on: small in the file, 2^levels when it is walked through."""
    return b")" + b"".join(b"q\x01h\x01h\x01\x86" for _ in range(levels))


@pytest.mark.parametrize(
    "pickled",
    [
        pytest.param(b"}r" + (2**27).to_bytes(4, "little"), id="memo index"),
        pytest.param(doubled(200) + b"Q", id="persistent id of tuples"),
        pytest.param(b"}" + doubled(200) + number(1) + b"s", id="key of tuples"),
        pytest.param(b"cos\nsystem\n" + text("true") + b"\x85R", id="call"),
        pytest.param(b"}" * 200_000, id="many values"),
        pytest.param(b"X" + (2**31 - 1).to_bytes(4, "little"), id="text of 2 GB"),
        pytest.param(b"\x8b" + (2**31 - 1).to_bytes(4, "little"), id="number of 2 GB"),
        pytest.param(b"h\x07", id="nothing remembered"),
        pytest.param(b"u", id="no mark"),
        pytest.param(b"(" * 100_000 + b"t", id="marks"),
        pytest.param(b"\x81", id="unknown instruction"),
    ],
)
def test_pickles(tmp_path: Path, pickled: bytes) -> None:
    write_zip(tmp_path / "pytorch_model.bin", pickled, {})
    files = open_checkpoint(tmp_path)
    assert not files.tensors
    assert all(fault.startswith("pytorch_model.bin: ") and len(fault) < 500 for fault in files.faults)


def test_odd_zip_files(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    write_torch_file(file, {"a": np.ones(3, np.float32)})
    whole = file.read_bytes()
    directory = whole.rindex(b"PK\x01\x02")
    for offset, change in ((6, b"\xff"), (8, b"\x00\x08"), (46, b"\xff\xfe"), (42, b"\xff\xff\xff\x7f"), (10, b"\x63")):
        file.write_bytes(whole[: directory + offset] + change + whole[directory + offset + len(change) :])
        for fault in open_checkpoint(tmp_path).faults:
            assert fault.startswith("pytorch_model.bin: ")
    with zipfile.ZipFile(file, "w") as archive:
        for index in range(3):
            archive.writestr(f"{index}/data.pkl", b"\x80\x02" + mapping({}) + b".")
    assert "without data.pkl" in open_checkpoint(tmp_path).faults[0]


DOUBLING = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}


@pytest.mark.parametrize(
    ("part", "change", "rule"),
    [
        ("normalizer", {"type": "Sequence", "normalizers": [DOUBLING] * 40}, "its normalizer makes texts more than"),
        ("normalizer", {**DOUBLING, "pattern": {"String": ""}}, "its normalizer makes texts more than 1000 times"),
        ("decoder", {"type": "Sequence", "decoders": [DOUBLING] * 40}, "its decoder makes texts more than 1000"),
        ("added_tokens", [{"id": 4294967295, "content": "x"}], "is not a tokenizer that the tokenizers library can"),
        ("model", {"type": "BPE", "vocab": {"a": 4294967295}, "merges": []}, "has a token with id 4294967295"),
        ("model", {"type": "BPE", "vocab": {"a": 0}, "merges": [["b", "c"]]}, "is not a tokenizer that the tokenizers"),
    ],
)  # fmt: skip
def test_odd_tokenizer_descriptions(tmp_path: Path, part: str, change: Any, rule: str) -> None:
    fill_byte_level(tmp_path, 1)
    file = tmp_path / "tokenizer.json"
    put_json(file, {**json.loads(file.read_text()), "post_processor": None, part: change})
    with pytest.raises(CheckpointError, match=rule) as caught:
        Tokenizer.load(tmp_path)
    one_line(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"bos_token": 5},
        {"added_tokens_decoder": []},
        {"added_tokens_decoder": {"99999999999": "x"}},
        {"tokenizer_class": 7},
        {"add_bos_token": "yes"},
        {"additional_special_tokens": 3},
    ],
)
def test_odd_settings_of_tokenizers(tmp_path: Path, change: dict[str, Any]) -> None:
    fill_byte_level(tmp_path, 1)
    put_json(tmp_path / "tokenizer_config.json", change)
    with pytest.raises(CheckpointError, match=f"tokenizer_config.json.*{next(iter(change))}") as caught:
        Tokenizer.load(tmp_path)
    one_line(caught.value)


def test_ids_beyond_the_vocabulary_begin_no_text(tmp_path: Path) -> None:
    fill_byte_level(tmp_path, 1)
    put_json(tmp_path / "config.json", {"bos_token_id": 10**6, "eos_token_id": [10**6]})
    put_json(tmp_path / "tokenizer_config.json", {"add_bos_token": True, "add_eos_token": True})
    tokenizer = Tokenizer.load(tmp_path)
    assert max(tokenizer.encode("a")) < tokenizer.vocab_size


@pytest.mark.parametrize(
    "content",
    [
        "[" * 100_000,
        "a: " + "[" * 5000,
        "a: 2001-99-99",
        "? {}\n: 1",
        "x" * 300_000,
        "- " * 3000,
        "{a: " * 200 + "1" + "}" * 200,
        "a: !!python/name:os.system",
    ],
)
def test_odd_yaml(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.yaml").write_text(content)
    with pytest.raises(ConfigError, match=r"^config="):
        read_yaml(str(tmp_path / "a.yaml"))
    os.mkfifo(tmp_path / "b.yaml")
    with pytest.raises(ConfigError, match="is not a regular file"):
        read_yaml(str(tmp_path / "b.yaml"))


def test_numbers_of_members_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickle_machine, "MAX_INSTRUCTIONS", 1000)
    write_zip(tmp_path / "pytorch_model.bin", b"}" * 1001, {})
    assert "more than 1000 instructions" in open_checkpoint(tmp_path).faults[0]
    monkeypatch.setattr(pickle_reader, "_LARGEST_DIRECTORY", 100)
    assert "its zip directory has more than 100 bytes" in open_checkpoint(tmp_path).faults[0]
    monkeypatch.setattr(safetensors_reader, "_MOST_TENSORS", 2)
    put_tensors(tmp_path / "model.safetensors", {name: np.zeros(1, np.float32) for name in "abc"})
    assert "has 3 tensors, 2 at most" in open_checkpoint(tmp_path).faults[0]
    fill_byte_level(tmp_path, 1)
    monkeypatch.setattr(huggingface_file, "MAX_TOKENS", 100)
    with pytest.raises(CheckpointError, match=r"tokens, 100 at most"):
        Tokenizer.load(tmp_path)


NO_NAMES = ["x" * 300, "a\0b", "\ud83d", "~nobody-of-that-name/x", "x" * 300 + ".json"]
"""Names that a file system does not take, or that lead nowhere."""


@pytest.mark.parametrize("name", NO_NAMES)
def test_names_that_no_file_has(name: str) -> None:
    tokenizer: Any = SimpleNamespace(chat_templates={})
    with pytest.raises(ConfigError, match="chat_template="):
        ChatTemplate.resolve(name, tokenizer, "LlamaForCausalLM")
    with pytest.raises(ConfigError, match="ssl_certfile="):
        certificate(ServerConfig(ssl=True, ssl_certfile=name))
    with pytest.raises(ConfigError, match="calib_dataset="):
        open_texts(name, folder=None, setting="calib_dataset", evaluate=False, render=lambda messages: None)
    with pytest.raises(RequestError, match=r"path=.* cannot be written"):
        Conversation().save(name + "/x")
    assert not is_url(name)


@pytest.mark.parametrize("argv", [["chat", "--config", ""], ["chat", ""], ["serve", "api_server", ""]])
def test_an_empty_name_is_no_default(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """As a script gives it whose variable is not set."""
    assert main([*argv, *(["--prompt", "hi"] if argv[0] == "chat" else ["--server-port", "0"])]) == 2
    assert capsys.readouterr().err.count("\n") == 1
