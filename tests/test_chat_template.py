from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from jaxdeploy.chat_template import CHAT_TEMPLATES, ChatTemplate
from jaxdeploy.config import ChatTemplateConfig
from jaxdeploy.errors import CheckpointError, ConfigError, RequestError
from jaxdeploy.tokenizer import Tokenizer
from tests.test_tokenizer import train_byte_level, train_sentencepiece, write_json

CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " What is 2 + 2? "},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": 'And <b>"3 & 3"</b>, 你好?'},
]
PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "description": "Where? <é>"},
        "days": {"type": ["integer", "string"], "description": "How many"},
    },
    "required": ["city"],
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "weather", "description": "Forecast", "parameters": PARAMETERS}}
]
CALL = {"id": "call12345", "type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}
TOOL_CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": "Rain?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "yes", "tool_call_id": "call12345"},
]
REAL = {
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use": ("tools",),
    "Qwen-Qwen2.5-7B-Instruct": ("plain", "system", "tools"),
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": ("plain", "system"),
    "google-gemma-2-2b-it": ("plain",),
    "meta-llama-Llama-3.1-8B-Instruct": ("plain", "system", "tools"),
    "microsoft-Phi-3.5-mini-instruct": ("plain", "system"),
    "mistralai-Mistral-Nemo-Instruct-2407": ("plain", "system", "tools"),
}
CASES = [(name, case) for name, cases in REAL.items() for case in cases]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    """Plain BPE: no template, begins and ends as its config says."""
    folder = train_byte_level(tmp_path)
    config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    write_json(folder / "tokenizer_config.json", config)
    return Tokenizer.load(folder)


def with_template(folder: Path, source: str, tokens: tuple[str, ...] = ()) -> Tokenizer:
    """A tokenizer that brings a Jinja template, and further special tokens."""
    (folder / "tokenizer_config.json").unlink(missing_ok=True)
    size = Tokenizer.load(train_byte_level(folder)).vocab_size
    added = {str(size + n): {"content": token, "special": True} for n, token in enumerate(tokens)}
    config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, "added_tokens_decoder": added}
    write_json(folder / "tokenizer_config.json", {**config, "chat_template": source})
    return Tokenizer.load(folder)


def resolve(spec: Any, tokenizer: Tokenizer, architecture: str = "LlamaForCausalLM") -> ChatTemplate:
    return ChatTemplate.resolve(spec, tokenizer, architecture)


def conversation(case: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    if case == "tools":
        return TOOL_CHAT, TOOLS
    return (CHAT if case == "system" else CHAT[1:]), None


@pytest.mark.parametrize(("name", "case"), CASES)
@pytest.mark.parametrize("prompt", [True, False])
def test_real_templates_render_as_in_transformers(
    shared: Path, tokenizer: Tokenizer, name: str, case: str, prompt: bool
) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    path = shared / f"assets/templates/{name}.jinja"
    messages, tools = conversation(case)
    [expected], _ = render_jinja_template(
        [messages],
        tools=tools,
        chat_template=path.read_text(encoding="utf-8"),
        add_generation_prompt=prompt,
        **tokenizer.special_tokens,
    )
    got = resolve(str(path), tokenizer).render(messages, add_generation_prompt=prompt, tools=tools)
    assert got == expected
    assert messages[-1]["content"] in got


def test_a_refusal_of_the_template_is_the_requests_fault(shared: Path, tokenizer: Tokenizer) -> None:
    gemma = resolve(str(shared / "assets/templates/google-gemma-2-2b-it.jinja"), tokenizer)
    with pytest.raises(RequestError, match="System role not supported"):
        gemma.render(CHAT)


ESCAPES = [
    "{{ messages.__class__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch PWNED') }}",
    "{{ raise_exception.__globals__['json'] }}",
    "{{ self.__init__.__globals__ }}",
    "{{ messages | attr('__class__') }}",
    "{{ '{0.__class__}'.format(messages) }}",
    "{% set n = namespace(__class__=1) %}",
    "{% set n = namespace() %}{% set n.__init__ = 1 %}",
    "{{ messages.append(1) }}",
    "{% for i in range(10**9) %}x{% endfor %}",
    "{{ os.system('touch PWNED') }}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_a_template_cannot_leave_the_sandbox(tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    template = resolve(None, with_template(tmp_path, source))
    with pytest.raises(RequestError, match="the chat template failed on the messages"):
        template.render(CHAT)
    assert not (tmp_path / "PWNED").exists()
    assert CHAT[0]["role"] == "system"


def test_broken_jinja_is_the_checkpoints_fault(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="chat_template line 1 is not valid Jinja"):
        resolve(None, with_template(tmp_path, "{% if %}"))


def test_what_transformers_adds_to_jinja_is_there(tmp_path: Path) -> None:
    source = (
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
        "{{ {'a': '<é>'} | tojson }}{{ dict(b=1)['b'] }}{{ strftime_now('%Y') | length }}{{ extra }}"
    )
    template = resolve(None, with_template(tmp_path, source))
    assert template.render(CHAT, extra="!") == 'Be brief.{"a": "<é>"}14!'


def test_text_parts_are_one_text_for_a_template(tmp_path: Path) -> None:
    template = resolve(None, with_template(tmp_path, "{{ messages[0].content + '.' }}"))
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert template.render([{"role": "user", "content": parts}]) == "ab."


def test_the_checkpoints_template_comes_first_then_the_familys_then_plain_text(tmp_path: Path) -> None:
    plain = Tokenizer.load(train_sentencepiece(tmp_path))
    assert resolve(None, plain).name == "base"
    assert resolve(None, plain).render(CHAT[1:2]) == CHAT[1]["content"]
    assert resolve(None, plain, "InternLMForCausalLM").name == "internlm"
    own = with_template(tmp_path, "own")
    assert resolve(None, own, "InternLMForCausalLM").render(CHAT[1:]) == "own"
    assert resolve("internlm", own).render(CHAT) != "own"


def test_stop_words_of_a_checkpoints_template(tmp_path: Path) -> None:
    source = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    template = resolve(None, with_template(tmp_path, source, ("<|im_start|>", "<|im_end|>", "<|action_end|>")))
    assert template.stop_words == ("<|im_end|>", "<|action_end|>")
    assert resolve(None, with_template(tmp_path, source, ("<|im_end|>",))).stop_words == ("<|im_end|>",)
    assert resolve(None, with_template(tmp_path, "{{ messages }}", ("<|im_end|>",))).stop_words == ()


def test_a_default_system_prompt_for_a_checkpoints_template(tmp_path: Path) -> None:
    own = with_template(tmp_path, "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}")
    template = resolve(ChatTemplateConfig(meta_instruction="Be kind."), own)
    assert template.render(CHAT[1:2]) == "[system]Be kind.[user] What is 2 + 2? "
    assert template.render(CHAT[:1]) == "[system]Be brief."


PIECES = {
    "llama2": "[INST] <<SYS>>\nS\n<</SYS>>\n\nU [/INST] A</s><s>[INST] V [/INST] ",
    "llama3": "".join(
        f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}"
        for role, text in (
            ("system", "S<|eot_id|>"),
            ("user", "U<|eot_id|>"),
            ("assistant", "A<|eot_id|>"),
            ("user", "V<|eot_id|>"),
            ("assistant", ""),
        )
    ),
    "vicuna": "S USER: U ASSISTANT: A</s>USER: V ASSISTANT:",
    "internlm": "<|System|>:S\n<|User|>:U\n<|Bot|>:A<eoa>\n<|User|>:V\n<|Bot|>:",
    "internlm2": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
    "<|im_start|>user\nV<|im_end|>\n<|im_start|>assistant\n",
    "mistral": "S[INST] U [/INST]A</s>[INST] V [/INST]",
    "solar": "### System:\nS\n\n### User:\nU\n\n### Assistant:\nA### User:\nV\n\n### Assistant:\n",
    "ultralm": "User: S</s>\nUser: U</s>\nAssistant: A</s>\nUser: V</s>\nAssistant: ",
    "gemma": "S<start_of_turn>user\nU<end_of_turn>\n<start_of_turn>model\nA<end_of_turn>\n"
    "<start_of_turn>user\nV<end_of_turn>\n<start_of_turn>model\n",
    "chatglm": "S[Round 1]\n\n问：U\n\n答：A\n\n[Round 2]\n\n问：V\n\n答：",
    "base": "SUAV",
}


@pytest.mark.parametrize(("name", "expected"), PIECES.items())
def test_builtin_templates(tokenizer: Tokenizer, name: str, expected: str) -> None:
    texts = [("system", "S"), ("user", "U"), ("assistant", "A"), ("user", "V")]
    messages = [{"role": role, "content": text} for role, text in texts]
    template = resolve(name, tokenizer)
    assert template.render(messages) == expected
    assert template.name == name


def test_every_builtin_renders_and_continues_a_reply(tokenizer: Tokenizer) -> None:
    for name in CHAT_TEMPLATES:
        template = resolve(name, tokenizer)
        opened = template.render(CHAT[:3])
        assert opened.endswith("4")
        assert template.render(CHAT[:3], add_generation_prompt=False).startswith(opened)


def test_lmdeploys_defaults_and_older_names(tokenizer: Tokenizer) -> None:
    question = [{"role": "user", "content": "U"}]
    assert resolve("qwen", tokenizer).render(question).startswith("<|im_start|>system\nYou are a helpful assistant.<")
    assert resolve("yi", tokenizer).render(question).startswith("<|im_start|>user\nU")
    assert resolve("internlm2-chat-7b", tokenizer).stop_words == ("<|im_end|>", "<|action_end|>")
    assert resolve("internlm2-7b", tokenizer).render(question) == "U"
    assert resolve("codellama", tokenizer).render(question).startswith("[INST] <<SYS>>\n\n<</SYS>>\n\nU")
    wanted = {"base", "llama2", "llama3", "vicuna", "internlm", "internlm2", "qwen", "mistral", "codellama", "yi"}
    assert wanted | {"solar", "ultralm", "wizardlm", "chatml"} <= CHAT_TEMPLATES.keys()


def test_a_config_replaces_pieces(tokenizer: Tokenizer) -> None:
    config = ChatTemplateConfig(model_name="internlm2", meta_instruction="M", eoa="<END>", stop_words=["<END>"])
    template = resolve(config, tokenizer)
    assert template.render(CHAT[1:3], add_generation_prompt=False) == (
        "<|im_start|>system\nM<|im_end|>\n<|im_start|>user\n What is 2 + 2? <|im_end|>\n<|im_start|>assistant\n4<END>\n"
    )
    assert template.stop_words == ("<END>",)
    mine = ChatTemplateConfig(model_name="mine", user="<q>", eoh="</q>", tool="<t>", eotool="</t>")
    messages = [{"role": "user", "content": "U"}, {"role": "tool", "content": "T"}]
    assert resolve(mine, tokenizer).render(messages) == "<q>U</q><t>T</t>"


def test_lmdeploys_json_file(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "template.json"
    fields = {"model_name": "mine", "system": "<s1>", "meta_instruction": "M", "eosys": "</s1>", "user": "Q: "}
    path.write_text(json.dumps({**fields, "eoh": "\n", "assistant": "A: ", "stop_words": ["Q:"]}), encoding="utf-8")
    template = resolve(str(path), tokenizer)
    assert template.render([{"role": "user", "content": "U"}]) == "<s1>M</s1>Q: U\nA: "
    assert (template.name, template.stop_words) == ("mine", ("Q:",))


@pytest.mark.parametrize("spec", ["vicunna", ChatTemplateConfig(model_name="vicunna")])
def test_an_unknown_name_names_the_nearest(tokenizer: Tokenizer, spec: str | ChatTemplateConfig) -> None:
    with pytest.raises(ConfigError, match="chat_template='vicunna' is no known name; the nearest one is vicuna; "):
        resolve(spec, tokenizer)
    with pytest.raises(ConfigError, match="chat_template='nope' is no known name; `jaxdeploy list`"):
        resolve("nope", tokenizer)


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({"enable_thinking": True, "tone": "calm"}, None),
        ({"thinking": False, "documents": [], "extra": None}, None),
        (
            {"enable_think": True},
            "chat_template_kwargs.enable_think is not read by chat template 'checkpoint'; the nearest one",
        ),
        ({"volume": 1, "tone": "calm", "pitch": 0}, "kwargs.volume, chat_template_kwargs.pitch are not read"),
        ({"begun": 1}, "chat_template_kwargs.begun is not read"),
        ({"raise_exception": 1}, "chat_template_kwargs.raise_exception is not read"),
    ],
)
def test_variables_must_be_read_by_the_template(tmp_path: Path, given: dict[str, Any], fault: str | None) -> None:
    source = (
        "{% if enable_thinking is not defined %}{% set enable_thinking = true %}{% endif %}{% set begun = 1 %}"
        "{{ messages[0].content }} {{ enable_thinking }} {{ tone }}{{ begun }}"
        "{% if 0 %}{{ raise_exception() }}{% endif %}"
    )
    template = resolve(None, with_template(tmp_path, source))
    expected = f"U {given.get('enable_thinking', True)} {given.get('tone', '')}1"
    if fault is None:
        assert template.render([{"role": "user", "content": "U"}], **given) == expected
        return
    with pytest.raises(RequestError, match=re.escape(fault)):
        template.render([{"role": "user", "content": "U"}], **given)


def test_builtin_templates_read_no_variables(tokenizer: Tokenizer) -> None:
    template = resolve("chatml", tokenizer)
    plain = template.render(CHAT)
    assert template.render(CHAT, enable_thinking=False) == plain
    with pytest.raises(RequestError, match=r"kwargs\.enable_thinking is not read by chat template 'chatml'"):
        template.render(CHAT, enable_thinking=True)


def test_a_missing_file(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match=r"chat_template='nowhere\.json' does not exist"):
        resolve("nowhere.json", tokenizer)


def test_capabilities(tmp_path: Path, tokenizer: Tokenizer) -> None:
    def ask(capability: str, text: str, known: Tokenizer = tokenizer) -> ChatTemplate:
        return resolve(ChatTemplateConfig(model_name="codellama", capability=capability), known)

    prompt = [{"role": "user", "content": "def f(<FILL>):"}]
    assert ask("completion", "x").render(prompt) == ask("python", "x").render(prompt) == "def f(<FILL>):"
    with pytest.raises(ConfigError, match="capability=infilling needs a model with the token <PRE>"):
        ask("infilling", "x")
    filler = ask("infilling", "x", with_template(tmp_path, "own", ("<PRE>",)))
    assert filler.render(prompt) == "<PRE> def f( <SUF>): <MID>"
    assert filler.stop_words == ("<EOT>",)
    with pytest.raises(RequestError, match="must hold <FILL> once"):
        filler.render([{"role": "user", "content": "no gap"}])


def test_begin_is_written_once(tmp_path: Path, tokenizer: Tokenizer) -> None:
    question = [{"role": "user", "content": "U"}]
    plain = resolve("base", tokenizer)
    assert plain.encode(question, tokenizer) == [0, *tokenizer.encode("U", add_bos=False)]
    own = with_template(tmp_path, "{{ bos_token }}{{ messages[0].content }}</s>")
    ids = resolve(None, own).encode(question, own)
    assert ids == [0, *own.encode("U", add_bos=False), 1]


@pytest.mark.parametrize(
    ("message", "fault"),
    [
        ({"role": "tool", "content": "T"}, "role='tool' is unknown to the chat template; use one of system, user"),
        ({"role": "user", "content": 3}, "content=3 must be text"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "content part type='image_url'"),
    ],
)
def test_messages_that_pieces_cannot_express(tokenizer: Tokenizer, message: dict[str, Any], fault: str) -> None:
    with pytest.raises(RequestError, match=fault):
        resolve("llama2", tokenizer).render([message])


def test_tools_need_a_template_that_knows_them(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="tools= has no place in chat template 'llama2'"):
        resolve("llama2", tokenizer).render(CHAT, tools=TOOLS)
