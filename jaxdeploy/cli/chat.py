"""``jaxdeploy chat``: flags, and what to do with them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from jaxdeploy.chat.input import given_prompt, line_reader
from jaxdeploy.cli.flags import Namespace, Parser, add_settings, read_settings
from jaxdeploy.config import LOG_LEVELS, ChatTemplateConfig, EngineConfig, GenerationConfig
from jaxdeploy.errors import ConfigError
from jaxdeploy.settings import ignored, setting, settings

if TYPE_CHECKING:
    from jaxdeploy.api.pipeline import Pipeline


@settings
class ChatOptions:
    """Options of the chat."""

    backend: str | None = setting(
        None, "accepted for LMDeploy's sake: there is one engine", choices=("turbomind", "pytorch")
    )
    chat_template: str | None = setting(
        None, "name (jaxdeploy list), or a JSON or Jinja file; default: the checkpoint's own"
    )
    meta_instruction: str | None = setting(None, "the system prompt")
    adapter_name: str | None = setting(None, "which of --adapters answers; default: the first")
    cap: str | None = setting(
        None,
        "chat, or completion: continue raw text",
        choices=("chat", "completion", "infilling", "python"),
    )
    log_level: str | None = setting(
        None,
        "how much to report on stderr; default: INFO in a conversation, else WARNING",
        choices=LOG_LEVELS,
    )
    device: str | None = ignored("JAX names the device: set JAX_PLATFORMS")


def add_arguments(parser: Parser) -> None:
    """MODEL, and every setting of chat, engine and generation."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a folder, or an id on the hub; default: bundled")
    parser.add_argument("--prompt", metavar="TEXT", help="answer this on stdout and exit; -: what is on stdin")
    parser.add_argument("--config", metavar="FILE.yaml", help="flags from a file, e.g. `session_len: 4096`")
    add_settings(parser, ChatOptions, EngineConfig, GenerationConfig)


def run(args: Namespace) -> int:
    """Load the model; answer ``--prompt`` or what is piped in, or else converse."""
    of_chat, of_engine, of_generation = read_settings(args, ChatOptions, EngineConfig, GenerationConfig)
    options = ChatOptions(**of_chat)
    gen_config = GenerationConfig(**of_generation)
    prompt = given_prompt(args.prompt)
    config = EngineConfig(**{"max_batch_size": 1, **of_engine})
    adapter = _adapter(options.adapter_name, config)
    options.log_level = options.log_level or ("INFO" if prompt is None else "WARNING")
    with _load(args.model, options, config) as pipe:
        return _chat(pipe, adapter, options, gen_config, prompt, args.model)


def _adapter(name: str | None, config: EngineConfig) -> str | None:
    """The LoRA adapter that answers, if there are any. Raises ``ConfigError`` for one that is not given."""
    given = config.adapters or {}
    if name is not None and name not in given:
        known = f"choose one of {', '.join(given)}" if given else f"add --adapters {name}=PATH"
        raise ConfigError(f"adapter_name={name!r} is not among --adapters; {known}")
    return name or next(iter(given), None)


def _load(model: str | None, options: ChatOptions, config: EngineConfig) -> Pipeline:
    template = template_config(options.chat_template, options.cap)  # the system prompt is a message of the conversation
    from jaxdeploy.api.loading import pipeline
    from jaxdeploy.bundled import bundled_model

    return pipeline(
        bundled_model() if model is None else model,
        backend_config=config,
        chat_template_config=template,
        log_level=options.log_level or "WARNING",
    )


def _chat(
    pipe: Pipeline,
    adapter: str | None,
    options: ChatOptions,
    gen_config: GenerationConfig,
    prompt: str | None,
    model: str | None,
) -> int:
    from jaxdeploy.chat.session import Conversation, WithAdapter
    from jaxdeploy.chat.terminal import Chat
    from jaxdeploy.cli import INTERRUPTED

    remembers = pipe.chat_template.capability == "chat"
    speaker = pipe if adapter is None else WithAdapter(pipe, adapter)
    chat = Chat(speaker, gen_config, Conversation(options.meta_instruction, remembers))
    if prompt is not None:
        return 0 if chat.answer_once(prompt) else INTERRUPTED
    chat.run(line_reader(), (model or "bundled model") + (f" with {adapter}" if adapter else ""))
    return 0


def template_config(
    named: str | None, capability: str | None, meta_instruction: str | None = None
) -> ChatTemplateConfig | str | None:
    """The chat template that flags ask for: a name or file, with another capability or default system prompt.

    Raises:
        ConfigError: a Jinja file is to have a system prompt.
    """
    if capability is None and meta_instruction is None:
        return named
    if named is None:
        return ChatTemplateConfig(capability=capability, meta_instruction=meta_instruction)
    if Path(named).suffix == ".jinja":
        if meta_instruction is not None:
            raise ConfigError(f"meta_instruction has no place in {named}; write it there, or leave it out")
        return named if capability == "chat" else ChatTemplateConfig(capability=capability)
    from_file = Path(named).suffix == ".json"
    config = ChatTemplateConfig.from_json(named) if from_file else ChatTemplateConfig(model_name=named)
    config.capability = capability or config.capability
    config.meta_instruction = config.meta_instruction if meta_instruction is None else meta_instruction
    return config
