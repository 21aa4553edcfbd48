"""The command: dispatch, errors as one line, flags and YAML, `list`, `check_env`, and the page made of the flags."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import write_cli_docs

from jaxdeploy.chat.input import given_prompt
from jaxdeploy.cli import COMMANDS, command_parser, main
from jaxdeploy.cli.chat import ChatOptions, template_config
from jaxdeploy.cli.flags import read_settings
from jaxdeploy.config import ChatTemplateConfig, EngineConfig, GenerationConfig
from jaxdeploy.errors import ConfigError


def given(*argv: str) -> list[dict[str, Any]]:
    args = command_parser("chat").read(argv)
    return read_settings(args, ChatOptions, EngineConfig, GenerationConfig)


def fails(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that a wrong call writes."""
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_overview_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    overview = capsys.readouterr().out
    assert all(name in overview for name in COMMANDS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == "jaxdeploy 0.1.0\n"


def test_help_is_quick() -> None:
    code = "import sys; from jaxdeploy.cli import main; main(sys.argv[1:]); assert 'jax' not in sys.modules"
    for argv in (["--help"], ["list"]):
        subprocess.run([sys.executable, "-c", code, *argv], check=True, capture_output=True, timeout=60)


def test_unknown_command_and_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert "the nearest one is chat;" in fails(capsys, "chatt")
    assert "the nearest one is --session-len" in fails(capsys, "chat", "--sesion-len", "5")
    assert "is one too many" in fails(capsys, "chat", "model", "other")
    assert "expected one argument" in fails(capsys, "chat", "--tp")


@pytest.mark.parametrize(
    "argv",
    [
        ("--tp", "two"),
        ("--tp", "0"),
        ("--dtype", "int3"),
        ("--cap", "sing"),
        ("--temperature", "hot"),
        ("--top-p", "2"),
        ("--backend", "vllm"),
        ("--quant-policy", "3"),
        ("--cache-max-entry-count", "1.5"),
        ("--log-level", "LOUD"),
        ("--config", "nowhere.yaml"),
        ("--chat-template", "no-such-template.json", "--cap", "chat"),
        ("--adapters", "a="),
    ],
)
def test_bad_flag_values(capsys: pytest.CaptureFixture[str], argv: tuple[str, ...]) -> None:
    line = fails(capsys, "chat", "nowhere", "--prompt", "hi", *argv)
    name = "chat_template" if argv[0] == "--chat-template" else argv[0][2:].replace("-", "_")
    assert line.startswith(f"error: {name}=")
    assert "; " in line


def test_a_prompt_comes_from_one_place(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert "stdin is empty" in fails(capsys, "chat", "nowhere")
    assert "stdin is empty" in fails(capsys, "chat", "nowhere", "--prompt", "-")
    (tmp_path / "text").write_text("from stdin", encoding="utf-8")
    with (tmp_path / "text").open(encoding="utf-8") as file:
        monkeypatch.setattr("sys.stdin", file)
        assert "two prompts" in fails(capsys, "chat", "nowhere", "--prompt", "hi")
        assert given_prompt("-") == "from stdin"
        assert given_prompt("") == "", "nothing is left on stdin"
    ends = os.pipe()
    os.write(ends[1], b"piped\n")
    with os.fdopen(ends[0], encoding="utf-8") as pipe:
        monkeypatch.setattr("sys.stdin", pipe)
        assert "two prompts" in fails(capsys, "chat", "nowhere", "--prompt", "hi")
        os.close(ends[1])
        assert given_prompt(None) == "piped"
    assert given_prompt("a\ud83d") == "a\ufffd"


def test_flags_become_settings() -> None:
    chat, engine, generation = given("m", "--session_len=64", "--tp", "2", "--top-k", "3", "--no-warmup", "--cap=chat")
    assert chat == {"cap": "chat"}
    assert engine == {"session_len": 64, "tp": 2, "warmup": False}
    assert generation == {"top_k": 3}
    assert given("--stop-words", "a", "b", "--cache-max-entry-count", "0.5")[1:] == [
        {"cache_max_entry_count": 0.5},
        {"stop_words": ["a", "b"]},
    ]
    assert given("--quant-policy", "none")[1] == {"quant_policy": 0}


def test_lmdeploys_other_flags_are_taken() -> None:
    flags = "--backend turbomind --trust-remote-code --eager-mode --communicator nccl --cache-block-seq-len 32"
    more = "--enable-prefix-caching --device cuda --async 1 --model-name vicuna"
    chat, engine, _ = given("m", *flags.split(), *more.split())
    ChatOptions(**chat)
    assert EngineConfig(**engine).block_size == 32


def test_flags_come_before_the_file(tmp_path: Path) -> None:
    path = tmp_path / "chat.yaml"
    path.write_text("session-len: 64\ntemperature: 0.5\nstop_words: [a]\nmeta_instruction: Be brief.\nasync: 1\n")
    chat, engine, generation = given("--config", str(path), "--temperature", "0.7")
    assert (chat["meta_instruction"], engine["session_len"]) == ("Be brief.", 64)
    assert generation == {"temperature": 0.7, "stop_words": ["a"]}
    path.write_text("sesion_len: 64\ntp: 0\nqwertz: 1\n")
    with pytest.raises(ConfigError) as three:
        given("--config", str(path))
    for fault in ("the nearest one is session_len", "tp=0 ", "qwertz=1 is not a setting"):
        assert fault in str(three.value)


def test_template_of_the_flags(tmp_path: Path) -> None:
    assert template_config("vicuna", None) == "vicuna"
    assert template_config(None, None) is None
    both = template_config("vicuna", "completion")
    assert both == ChatTemplateConfig(model_name="vicuna", capability="completion")
    path = tmp_path / "mine.json"
    ChatTemplateConfig(user="U:").to_json(path)
    from_file = template_config(str(path), "python")
    assert from_file == ChatTemplateConfig(user="U:", capability="python")
    assert template_config("x.jinja", "chat") == "x.jinja"


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("LlamaForCausalLM", "internlm2", "qwen2", "mistral", "vicuna", "llama2"))


def test_check_env(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["check-env", "--dump-file", str(tmp_path / "env.json")]) == 0
    out = capsys.readouterr().out
    report = json.loads((tmp_path / "env.json").read_text())
    assert report["versions"]["jax"] in out
    assert len(report["devices"]) == 8
    assert {"op": "paged_attention", "backend": "reference", "usable": True, "reason": ""} in report["kernels"]
    assert main(["check_env", "--dump-file", str(tmp_path)]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_page_is_current() -> None:
    assert write_cli_docs.TARGET.read_text(encoding="utf-8") == write_cli_docs.render(), (
        "run: python scripts/write_cli_docs.py"
    )


@pytest.mark.parametrize(
    ("command", "code", "line"),
    [
        ("list > /dev/full", 2, "error: No space left on device; make room, or write to another place\n"),
        ("chat <&-", 2, "error: stdin is empty; pipe a text into it, or give one with --prompt\n"),
        ("list >&-", 0, ""),
    ],
)
def test_streams_that_are_full_or_closed(command: str, code: int, line: str) -> None:
    ran = subprocess.run(f"{sys.executable} -m jaxdeploy {command}", shell=True, capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (code, line)
