"""The chat: one answer, the conversation and its commands, Ctrl-C, input of several lines, and a real model."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxdeploy import EngineConfig, GenerationConfig
from jaxdeploy.bundled import bundled_model
from jaxdeploy.chat.input import _key_bindings, read_lines
from jaxdeploy.chat.session import ChatReply, Conversation, stream_reply
from jaxdeploy.chat.terminal import Chat
from jaxdeploy.cli import main as command
from jaxdeploy.errors import ModelNotFoundError
from jaxdeploy.messages import FinishReason
from pallas_kernels.dispatch import ENVIRONMENT
from tests.fake_generator import FakeGenerator, fake_pipeline


def main(argv: list[str]) -> int:
    return command(["chat", *argv])


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[FakeGenerator]:
    """The generators that the command loads, all of them echoing."""
    made: list[FakeGenerator] = []

    def load(model: str, config: EngineConfig, *, chat_template: Any, progress: bool) -> FakeGenerator:
        made.append(FakeGenerator(template=chat_template, config=config))
        return made[-1]

    monkeypatch.setattr("jaxdeploy.engine.front.generator.Generator.from_pretrained", load, raising=False)
    return made


def a_chat(**kwargs: Any) -> tuple[Chat, Conversation, FakeGenerator]:
    pipe, generator = fake_pipeline(**kwargs)
    conversation = Conversation(remembers=pipe.chat_template.capability == "chat")
    return Chat(pipe, GenerationConfig(), conversation), conversation, generator


def test_prompt_is_answered_on_stdout_alone(loads: list[FakeGenerator], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["m", "--prompt", "hello"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "hello\n"
    assert re.fullmatch(r"\[5 tokens · TTFT \d\.\d\d s · [\d.]+ tok/s\]\n", captured.err)
    assert loads[0].closed
    assert loads[0].config is not None
    assert loads[0].config.max_batch_size == 1


def test_a_reply_that_ends_its_line_gets_no_second_newline(
    loads: list[FakeGenerator], capsys: pytest.CaptureFixture[str]
) -> None:
    main(["m", "--prompt", "hello\n"])
    assert capsys.readouterr().out == "hello\n"


def test_piped_input_is_one_prompt(
    loads: list[FakeGenerator], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("two\nlines\n"))
    assert main(["m", "--max-new-tokens", "5"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "two\nl\n"
    assert captured.err.endswith("· cut off at max_new_tokens]\n")


def test_an_adapter_answers(loads: list[FakeGenerator], capsys: pytest.CaptureFixture[str]) -> None:
    """The first, unless another one is named."""
    argv = ["m", "--prompt", "hello", "--adapters", "x=/one", "/folder/two"]
    assert main(argv) == 0
    assert main([*argv, "--adapter-name", "two"]) == 0
    assert [load.submitted[0].adapter for load in loads] == ["x", "two"]
    assert main([*argv, "--adapter-name", "three"]) == 2
    assert main([*argv[:3], "--adapter-name", "three"]) == 2
    assert "adapter_name='three' is not among --adapters; choose one of x, two\n" in capsys.readouterr().err


def test_completion_passes_text_on(loads: list[FakeGenerator], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["m", "--chat-template", "chatml", "--cap", "completion", "--prompt", "Once"]) == 0
    assert capsys.readouterr().out == "Once\n"
    assert main(["m", "--cap", "completion", "--prompt", ""]) == 0
    assert loads[1].submitted[0].prompt_token_ids == (1,)


def test_system_prompt_and_template(loads: list[FakeGenerator], capsys: pytest.CaptureFixture[str]) -> None:
    main(["m", "--chat-template", "chatml", "--meta-instruction", "Be brief.", "--prompt", "hi"])
    out = capsys.readouterr().out
    assert out.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>")


def test_too_long_a_prompt_is_one_line(loads: list[FakeGenerator], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["m", "--prompt", "x" * 299]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "error: prompt has 300 tokens, session_len=256; shorten the prompt\n"
    assert loads[0].closed


def test_the_conversation_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    chat, conversation, _ = a_chat()
    assert chat.take("a")
    assert chat.take("b")
    assert capsys.readouterr().out == "a\naab\n"
    assert [message["content"] for message in conversation.messages] == ["a", "a", "b", "aab"]
    chat.take("/reset")
    assert not conversation.messages
    chat.take("c")
    chat.take("end")
    assert not conversation.messages


def test_completion_keeps_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    from jaxdeploy import ChatTemplateConfig

    chat, _, _ = a_chat(template=ChatTemplateConfig(capability="completion"))
    chat.take("a")
    chat.take("b")
    assert capsys.readouterr().out == "a\nb\n"


def test_commands(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    chat, conversation, _ = a_chat(template="chatml")
    chat.take("/help")
    assert "/system TEXT" in capsys.readouterr().err
    chat.take("/system Be kind.")
    chat.take("hi")
    assert "Be kind." in capsys.readouterr().out
    chat.take("/system")
    assert "Be kind." in capsys.readouterr().err
    chat.take(f"/save {tmp_path / 'chat.json'}")
    saved = json.loads((tmp_path / "chat.json").read_text())
    assert [message["role"] for message in saved] == ["system", "user", "assistant"]
    assert saved[1:] == conversation.messages
    assert chat.take("") is True
    assert chat.take("/exit") is False
    assert chat.take("exit") is False


def test_faults_are_one_line_and_the_chat_goes_on(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    chat, conversation, _ = a_chat()
    faults = {
        f"/save {tmp_path}/no/such/folder.json": "cannot be written",
        "/save": "needs a file's name",
        "/hepl": "the nearest one is /help",
        "x" * 299: "; /reset begins anew",
    }
    for text, says in faults.items():
        assert chat.take(text)
        err = capsys.readouterr().err
        assert err.startswith("error: ")
        assert says in err
        assert err.count("\n") == 1
    assert not conversation.messages
    chat.take("/etc/hosts is a file")
    assert capsys.readouterr().out == "/etc/hosts is a file\n"


def test_the_loop_ends_with_the_input(capsys: pytest.CaptureFixture[str]) -> None:
    chat, conversation, _ = a_chat()
    inputs: Iterator[str | BaseException] = iter(["a", KeyboardInterrupt(), " b ", EOFError()])

    def read() -> str:
        said = next(inputs)
        if isinstance(said, BaseException):
            raise said
        return said

    chat.run(read, "m")
    assert [message["content"] for message in conversation.messages[::2]] == ["a", "b"]
    assert "/exit leaves" in capsys.readouterr().err


def test_ctrl_c_stops_the_reply_and_not_the_program() -> None:
    pipe, generator = fake_pipeline()
    said: list[str] = []

    def write(text: str) -> None:
        said.append(text)
        if len(said) == 3:
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    reply = stream_reply(pipe, "abcdef", GenerationConfig(), write)
    assert "".join(said) == reply.text == "abc"
    assert reply.finish_reason is FinishReason.ABORT
    assert reply.summary().endswith(" · stopped]")
    assert not generator.has_work
    assert signal.getsignal(signal.SIGINT) is before
    assert stream_reply(pipe, "next", GenerationConfig(), said.append).text == "next"


def test_a_second_ctrl_c_leaves() -> None:
    pipe, generator = fake_pipeline()

    def write(text: str) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        stream_reply(pipe, "abcdef", GenerationConfig(), write)
    assert not generator.has_work


def test_summary() -> None:
    reply = ChatReply("text", num_tokens=5, started_at=1.0, first_token_at=1.5, updated_at=2.5)
    assert reply.summary() == "[5 tokens · TTFT 0.50 s · 4.0 tok/s]"
    assert ChatReply().summary() == "[0 tokens]"
    assert (
        ChatReply("a", num_tokens=1, started_at=1.0, first_token_at=1.5, updated_at=1.5).summary()
        == "[1 token · TTFT 0.50 s]"
    )


def test_a_backslash_goes_on_in_the_next_line(monkeypatch: pytest.MonkeyPatch) -> None:
    typed = iter(["one\\", "two"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    assert read_lines() == "one\ntwo"


@pytest.mark.parametrize(
    ("keys", "text"), [("ab\r", "ab"), ("a\\\rb\r", "a\nb"), ("a\x1b\rb\r", "a\nb")], ids=["enter", "backslash", "alt"]
)
def test_keys_on_a_terminal(keys: str, text: str) -> None:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput

    with create_pipe_input() as pipe_input:
        pipe_input.send_text(keys)
        session: PromptSession[str] = PromptSession(
            multiline=True, key_bindings=_key_bindings(), input=pipe_input, output=DummyOutput()
        )
        assert session.prompt() == text


def test_without_the_bundled_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("jaxdeploy.bundled.DEMO", tmp_path)
    with pytest.raises(ModelNotFoundError, match="name a MODEL"):
        bundled_model()


@pytest.fixture
def run(shared: Path) -> Callable[..., subprocess.CompletedProcess[bytes]]:
    """Run the chat as users do, on a real model and one device."""

    def call(*argv: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
        model = str(shared / "assets/models/stories260K")
        command = [sys.executable, "-m", "jaxdeploy.chat", model, *argv]
        env = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"}
        return subprocess.run(command, capture_output=True, env=env, timeout=300, **options)

    return call


FEWER_SHAPES = ("--max-batch-size", "1", "--max-prefill-token-num", "32")


@pytest.mark.parametrize("fewer_shapes", [FEWER_SHAPES, pytest.param((), marks=pytest.mark.slow)])
def test_golden_story(
    run: Callable[..., subprocess.CompletedProcess[bytes]], shared: Path, fewer_shapes: tuple[str, ...]
) -> None:
    usual = "--cap", "completion", "--prompt", "", "--temperature", "0", "--max-new-tokens", "256"
    done = run(*usual, *fewer_shapes)
    assert done.stdout == (shared / "assets/models/stories260K/golden_greedy.txt").read_bytes()
    assert done.returncode == 0
    assert b"tok/s" in done.stderr


def test_prompt_longer_than_session_len(run: Callable[..., subprocess.CompletedProcess[bytes]]) -> None:
    done = run("--session-len", "16", "--no-warmup", input=b"Once upon a time there was a girl. " * 9)
    assert done.returncode == 2
    assert done.stdout == b""
    last = done.stderr.decode().splitlines()[-1]
    assert last.startswith("error: ")
    assert "session_len" in last
    assert b"Traceback" not in done.stderr


def story_copy(shared: Path, folder: Path, **config: Any) -> None:
    """The story model in ``folder``, with entries of its config.json replaced."""
    for file in (shared / "assets/models/stories260K").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**described, **config}))


def wrong_call(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """What a call that cannot work says, on stderr alone."""
    assert main([*argv, "--prompt", "hi"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    return captured.err


def test_no_model_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    missing = wrong_call(capsys, str(tmp_path / "missing"))
    empty = wrong_call(capsys, str(tmp_path))
    assert missing.count("\n") == empty.count("\n") == 1
    assert "config.json" in empty


def test_unknown_architecture(capsys: pytest.CaptureFixture[str], shared: Path, tmp_path: Path) -> None:
    story_copy(shared, tmp_path, architectures=["OtherForCausalLM"])
    err = wrong_call(capsys, str(tmp_path))
    assert "LlamaForCausalLM" in err
    assert err.count("\n") == 1


def test_truncated_weights(capsys: pytest.CaptureFixture[str], shared: Path, tmp_path: Path) -> None:
    story_copy(shared, tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "model.safetensors" in wrong_call(capsys, str(tmp_path))


def test_misshaped_and_missing_tensors_are_listed(
    capsys: pytest.CaptureFixture[str], shared: Path, tmp_path: Path
) -> None:
    story_copy(shared, tmp_path, num_hidden_layers=6, intermediate_size=176)
    err = wrong_call(capsys, str(tmp_path))
    assert "model.layers.5.self_attn.q_proj.weight" in err
    assert "model.layers.0.mlp.down_proj.weight" in err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--tp", "3"], "tp=3 must divide 8 query heads"),
        (["--num-blocks", "1", "--session-len", "512"], "block"),
        (["--tp", "16"], "tp=16"),
    ],
)
def test_settings_that_do_not_fit(
    capsys: pytest.CaptureFixture[str], shared: Path, flags: list[str], says: str
) -> None:
    err = wrong_call(capsys, str(shared / "assets/models/stories260K"), *flags)
    assert says in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (
            "kv_cache_write=pallas_triton",
            "pallas_triton needs a head_dim that is a multiple of 16, have 8",
        ),
        ("attention=reference", "names no op; choose from decode_layer"),
    ],
)
def test_kernels_that_do_not_fit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, shared: Path, value: str, says: str
) -> None:
    monkeypatch.setenv(ENVIRONMENT, value)
    err = wrong_call(capsys, str(shared / "assets/models/stories260K"), "--session-len", "64")
    assert err.startswith(f"error: {ENVIRONMENT}={value} does not fit: ")
    assert says in err
    assert err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_interpreted_kernels_give_the_same_reply(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    replies = []
    for backend in ("", "pallas_triton"):
        jax.clear_caches()
        monkeypatch.setenv(ENVIRONMENT, backend)
        assert main(["--prompt", "What is 6 times 7?", "--session-len", "128", "--dtype", dtype]) == 0
        replies.append(capsys.readouterr().out)
    assert replies[0] == replies[1] == "6 x 7 = 42.\n"
