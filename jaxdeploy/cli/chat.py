"""``jaxdeploy chat``: flags, and what to do with them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from jaxdeploy.chat_input import given_prompt, line_reader
from jaxdeploy.cli.flags import Namespace, Parser, add_settings, read_settings
from jaxdeploy.config import ChatTemplateConfig, EngineConfig, GenerationConfig
from jaxdeploy.errors import ConfigError
from jaxdeploy.settings import ignored, setting, settings

if TYPE_CHECKING:
    from jaxdeploy.pipeline import Pipeline


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
        choices=("DEBUG", "INFO", "WARNING", "ERROR"),
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
    template = template_config(options)
    from jaxdeploy.chat import bundled_model
    from jaxdeploy.pipeline import pipeline

    return pipeline(
        model or bundled_model(),
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
    from jaxdeploy.chat import Chat
    from jaxdeploy.chat_session import Conversation, WithAdapter
    from jaxdeploy.cli import INTERRUPTED

    remembers = pipe.chat_template.capability == "chat"
    speaker = pipe if adapter is None else WithAdapter(pipe, adapter)
    chat = Chat(speaker, gen_config, Conversation(options.meta_instruction, remembers))
    if prompt is not None:
        return 0 if chat.answer_once(prompt) else INTERRUPTED
    chat.run(line_reader(), (model or "bundled model") + (f" with {adapter}" if adapter else ""))
    return 0


def template_config(options: ChatOptions) -> ChatTemplateConfig | str | None:
    """The chat template that the flags ask for; the system prompt is a message, not part of it."""
    named = options.chat_template
    if options.cap is None or named is None:
        return named if options.cap is None else ChatTemplateConfig(capability=options.cap)
    if Path(named).suffix == ".json":
        config = ChatTemplateConfig.from_json(named)
    elif Path(named).suffix == ".jinja":
        return named if options.cap == "chat" else ChatTemplateConfig(capability=options.cap)
    else:
        config = ChatTemplateConfig(model_name=named)
    config.capability = options.cap
    return config
