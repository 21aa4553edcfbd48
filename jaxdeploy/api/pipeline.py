"""The synchronous Python API: ``pipeline("MODEL")`` gives an object that answers prompts."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeAlias

from jaxdeploy.api.arguments import any_order, config_of, split_settings, without_unused
from jaxdeploy.api.embedding import pooled
from jaxdeploy.api.jobs import Job
from jaxdeploy.api.prompts import Prompt, Prompts, as_list, encode
from jaxdeploy.api.response import Response, Session
from jaxdeploy.api.streams import Streams
from jaxdeploy.config import ChatTemplateConfig, EngineConfig, GenerationConfig, SpeculativeConfig
from jaxdeploy.errors import ConfigError, RequestError
from jaxdeploy.files.stored import shown
from jaxdeploy.generation.resolved import resolve
from jaxdeploy.messages import PromptReading

if TYPE_CHECKING:
    from jaxdeploy.chat_template import ChatTemplate
    from jaxdeploy.engine.front.generator import Generator
    from jaxdeploy.tokenizer import Tokenizer

logger = logging.getLogger("jaxdeploy")

GenConfigs: TypeAlias = (
    GenerationConfig | Mapping[str, Any] | Sequence[GenerationConfig | Mapping[str, Any] | None] | None
)
"""How to generate: for all prompts, or for each."""

AdapterNames: TypeAlias = str | Sequence[str | None] | None
"""One LoRA adapter for all prompts, or one for each; ``None`` is the model itself."""


@any_order
def pipeline(
    model_path: str | Path,
    backend_config: EngineConfig | Mapping[str, Any] | str | None = None,
    chat_template_config: ChatTemplateConfig | Mapping[str, Any] | str | None = None,
    log_level: str = "WARNING",
    max_log_len: int | None = None,
    trust_remote_code: bool | None = None,
    speculative_config: SpeculativeConfig | None = None,
    *,
    model_name: str | None = None,
    **settings: Any,
) -> Pipeline:
    """Load a model and make it ready to answer.

    LMDeploy's versions order these arguments differently. A positional config is recognised by its type, and a text in
    second place is ``model_name``, as in LMDeploy 0.3.

    Args:
        model_path: a folder with a checkpoint, or a model's id on the Hugging Face hub.
        backend_config: how the engine runs; an ``EngineConfig``, or a mapping of its fields.
        chat_template_config: a config, a built-in template's name, or a JSON or Jinja file; default: the checkpoint's.
        log_level: DEBUG, INFO, WARNING, ERROR or CRITICAL, for the logger ``jaxdeploy``.
        max_log_len: accepted and ignored; prompts are not logged.
        trust_remote_code: accepted and ignored; code of a checkpoint is never run.
        speculative_config: who guesses tokens, as LMDeploy has it; the same as the fields of ``EngineConfig``.
        model_name: the name of a built-in chat template. Other names change nothing.
        **settings: fields of ``EngineConfig``, laid over ``backend_config``.

    Raises:
        JaxdeployError: a setting, the checkpoint or the memory does not fit; the message says what to do.
    """
    from jaxdeploy.engine.front.generator import Generator

    set_log_level(log_level)
    if isinstance(chat_template_config, Mapping):
        chat_template_config = ChatTemplateConfig(**chat_template_config)
    config = config_of(EngineConfig, backend_config, "backend_config")
    guessing = speculative_config.fields if speculative_config is not None else {}
    unheeded = {"max_log_len": max_log_len, "trust_remote_code": trust_remote_code}
    (config,) = split_settings({**guessing, **unheeded, **without_unused(settings)}, config)
    template = chat_template_config or _template_named(model_name or config.model_name)
    bars = sys.stderr.isatty()
    return Pipeline(Generator.from_pretrained(str(model_path), config, chat_template=template, progress=bars))


class Pipeline:
    """Answers prompts with one loaded model; also a context manager that frees the device memory at its end.

    Several threads may call it at once: their prompts then run in the same batches.
    """

    def __init__(self, generator: Generator) -> None:
        self._generator: Generator | None = generator
        self._streams = Streams(generator)
        self._session_ids = itertools.count()
        self._names = map(str, itertools.count())
        """Names of requests. None comes twice, so that a late ``stop_session`` cannot end a session's next reply."""
        self._running: dict[int, list[str]] = {}

    @property
    def generator(self) -> Generator:
        """The loaded model. Raises ``RequestError`` after ``close``."""
        if self._generator is None:
            raise RequestError("this pipeline is closed; make a new one with pipeline(...)")
        return self._generator

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer."""
        return self.generator.tokenizer

    @property
    def chat_template(self) -> ChatTemplate:
        """The chat template in use."""
        return self.generator.template

    @property
    def session_len(self) -> int:
        """Longest prompt plus reply, in tokens."""
        return self.generator.session_len

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the LoRA adapters that ``adapter_name`` may be."""
        engine = self.generator.engine
        return self._streams.between_steps(lambda: engine.stats.adapters)

    def load_adapter(self, name: str, path: str | Path) -> None:
        """Read a LoRA adapter in PEFT's layout; it takes the place of one that has this name.

        Replies go on meanwhile, those that run with an adapter of this name to their end.

        Raises:
            CheckpointError: it is damaged or does not fit; the message lists every fault.
            ConfigError: there is no room for adapters.
        """
        engine = self.generator.engine
        self._streams.between_steps(lambda: engine.load_adapter(name, path)).result()

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter; replies that run with it go on to their end. Raises ``UnknownAdapterError``."""
        engine = self.generator.engine
        self._streams.between_steps(lambda: engine.unload_adapter(name)).result()

    def __call__(
        self,
        prompts: Prompts,
        gen_config: GenConfigs = None,
        do_preprocess: bool = True,
        adapter_name: AdapterNames = None,
        use_tqdm: bool | None = None,
        **options: Any,
    ) -> Response | list[Response]:
        """Answer one prompt or many.

        Args:
            prompts: a text, a list of messages, ``{"prompt_token_ids": [...]}``, or a list of any of these.
            gen_config: for all prompts, or a list with one for each. A mapping of its fields will do.
            do_preprocess: False: texts are not put into the chat template.
            adapter_name: the LoRA adapter to answer with, for all prompts or a list with one for each (None: the model
                itself).
            use_tqdm: a progress bar on stderr; default: on a terminal, for more than one prompt.
            **options: single fields of ``GenerationConfig`` by their names; ``request_output_len``, LMDeploy's older
                name of ``max_new_tokens``; ``add_generation_prompt`` and ``continue_final_message``: begin a reply, or
                continue the last message. By default a reply that comes last is continued.

        Returns:
            One ``Response`` for one prompt; a list for a list of prompts, or where ``n`` is above 1.

        Raises:
            RequestError: a prompt cannot be served, or (``UnknownAdapterError``) there is no such adapter; nothing was
                generated then.
        """
        given = _call(gen_config, do_preprocess, adapter_name, options)
        jobs, single = self._jobs(prompts, **given)
        responses = [Response("", 0, len(job.ids), job.session_id, index=job.index) for job in jobs]
        with _progress_bar(len(jobs), use_tqdm) as bar:
            for piece in self._stream(jobs):
                responses[piece.index].extend(piece)
                bar.update(piece.finish_reason is not None)
        return responses[0] if single and len(responses) == 1 else responses

    infer = __call__
    batch_infer = __call__

    def stream_infer(
        self,
        prompts: Prompts,
        gen_config: GenConfigs = None,
        do_preprocess: bool = True,
        adapter_name: AdapterNames = None,
        **options: Any,
    ) -> Iterator[Response]:
        """As a call, but yield each piece as soon as it is there; ``index`` tells the replies of many prompts apart.

        Leaving the loop early drops what is still running. The prompts are queued when the loop starts.
        """
        given = _call(gen_config, do_preprocess, adapter_name, options)
        return self._stream(self._jobs(prompts, **given)[0])

    def embed(
        self, texts: Prompts, *, pooling: str = "last", normalize: bool = True, adapter_name: AdapterNames = None
    ) -> list[list[float]]:
        """A vector of D numbers for each of ``texts``, which are taken as they are, or of token ids.

        Args:
            texts: as the prompts of a call.
            pooling: ``last``, the hidden state of the last token, or ``mean``, of all.
            normalize: have vectors of length 1.
            adapter_name: as in a call.

        Raises:
            RequestError: a text is empty or too long, or the pooling or adapter is unknown.
        """
        config = GenerationConfig(do_sample=False, max_new_tokens=1)
        jobs, _ = self._jobs(texts, config, do_preprocess=False, adapter_name=adapter_name)
        return [pooled(reading, pooling, normalize=normalize) for reading in self._read(jobs)]

    def get_ppl(
        self, input_ids: Sequence[int] | Sequence[Sequence[int]], *, adapter_name: AdapterNames = None
    ) -> list[float]:
        """For each sequence of at least 2 token ids the mean cross-entropy of all but the first, in nats.

        It is LMDeploy's function of the name: the perplexity is the exponential of what it gives.

        Raises:
            RequestError: a sequence is too short or too long.
        """
        several: Any = [input_ids] if input_ids and isinstance(input_ids[0], int) else input_ids
        prompts = [{"prompt_token_ids": list(ids)} for ids in several]
        if any(len(prompt["prompt_token_ids"]) < 2 for prompt in prompts):
            raise RequestError("input_ids must have at least 2 tokens each: the first is not scored; give more")
        config = GenerationConfig(do_sample=False, max_new_tokens=1, prompt_logprobs=0)
        jobs, _ = self._jobs(prompts, config, do_preprocess=False, adapter_name=adapter_name)
        scores = [reading.logprobs for reading in self._read(jobs)]
        return [-sum(token.logprob for token in tokens) / len(tokens) for tokens in scores]

    def chat(
        self,
        prompt: str,
        session: Session | None = None,
        gen_config: GenerationConfig | Mapping[str, Any] | None = None,
        stream_response: bool = False,
        **options: Any,
    ) -> Session | Iterator[Response]:
        """Say ``prompt`` in a conversation and return it with the reply (``session.response``) in its history.

        Without ``session`` a new one begins. With ``stream_response`` the pieces of the reply are yielded instead; the
        history grows when the last one has come.
        """
        session = session or self.session()
        pieces = self._say(prompt, session, gen_config, options)
        if stream_response:
            return pieces
        for _ in pieces:
            pass
        return session

    def session(self) -> Session:
        """A new, empty conversation."""
        return Session(next(self._session_ids))

    def stop_session(self, session: Session | int) -> None:
        """End the replies that run for a session, from another thread or a signal handler."""
        session_id = session.session_id if isinstance(session, Session) else session
        self._streams.stop(self._running.get(session_id, []))

    end_session = stop_session

    def close(self) -> None:
        """Free the model and its KV cache on the device. The pipeline cannot be used afterwards."""
        if self._generator is not None:
            self._generator = None
            self._streams.close()
            del self._streams

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _say(
        self, prompt: str, session: Session, gen_config: GenConfigs, options: dict[str, Any]
    ) -> Iterator[Response]:
        messages = [*session.messages, {"role": "user", "content": prompt}]
        jobs, _ = self._jobs(messages, gen_config, session_id=session.session_id, **options)
        return self._remember(prompt, session, self._stream([dataclasses.replace(jobs[0], goes_on=True)]))

    def _remember(self, prompt: str, session: Session, pieces: Iterator[Response]) -> Iterator[Response]:
        reply: Response | None = None
        for piece in pieces:
            reply = dataclasses.replace(piece) if reply is None else reply.extend(piece)
            yield piece
        assert reply is not None, "a stream has at least the piece that ends it"
        session.response = reply
        session.history.append((prompt, reply.text))

    def _jobs(
        self,
        prompts: Prompts,
        gen_config: GenConfigs,
        *,
        do_preprocess: bool = True,
        adapter_name: AdapterNames = None,
        session_id: int | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | None = None,
        **fields: Any,
    ) -> tuple[list[Job], bool]:
        several, single = as_list(prompts)
        ending = {"add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message}
        configs, adapters = _configs(gen_config, len(several), fields), _adapters(adapter_name, len(several))
        jobs: list[Job] = []
        for prompt, config, adapter in zip(several, configs, adapters, strict=True):
            session = next(self._session_ids) if session_id is None else session_id
            jobs += self._alternatives(prompt, config, adapter, do_preprocess, ending, session, len(jobs))
        return jobs, single

    def _alternatives(
        self,
        prompt: Prompt,
        config: GenerationConfig,
        adapter: str | None,
        do_preprocess: bool,
        ending: dict[str, bool | None],
        session_id: int,
        first: int,
    ) -> list[Job]:
        made = self.generator
        ids = encode(prompt, made.tokenizer, made.template, do_preprocess=do_preprocess, **ending)
        how = resolve(
            config,
            made.generation_defaults,
            made.tokenizer,
            eos_token_ids=made.eos_token_ids,
            template_stops=made.template.stop_words if do_preprocess else (),
        )
        return [Job(ids, session_id, first + index, how, index, adapter) for index in range(how.n)]

    def _read(self, jobs: list[Job]) -> list[PromptReading]:
        """What is told of the prompts of ``jobs``; what they are answered is dropped."""
        names = {next(self._names): job for job in jobs}
        readings: dict[int, PromptReading] = {}
        for output in self._streams.read([job.request(name, embed=True) for name, job in names.items()]):
            if output.error is not None:
                raise output.error
            if output.prompt is not None:
                readings[names[output.request_id].index] = output.prompt
        return [readings[job.index] for job in jobs]

    def _stream(self, jobs: list[Job]) -> Iterator[Response]:
        by_id = {next(self._names): job for job in jobs}
        lengths = dict.fromkeys(by_id, 0)
        for request_id, job in by_id.items():
            self._running.setdefault(job.session_id, []).append(request_id)
        try:
            for output in self._streams.read([job.request(name) for name, job in by_id.items()]):
                lengths[output.request_id] += len(output.token_ids)
                yield by_id[output.request_id].piece(output, lengths[output.request_id])
        finally:
            for request_id, job in by_id.items():
                self._forget(job.session_id, request_id)

    def _forget(self, session_id: int, request_id: str) -> None:
        names = self._running[session_id]
        names.remove(request_id)
        if not names:
            del self._running[session_id]


def _call(
    gen_config: GenConfigs, do_preprocess: Any, adapter_name: AdapterNames, options: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of a call. In LMDeploy 0.3 ``request_output_len`` is in third place, before ``do_preprocess``."""
    given = {"adapter_name": adapter_name, **without_unused(options)}
    if isinstance(do_preprocess, bool):
        return {"gen_config": gen_config, "do_preprocess": do_preprocess, **given}
    if isinstance(do_preprocess, int) and adapter_name is None:
        return {"gen_config": gen_config, "request_output_len": do_preprocess, **given}
    raise ConfigError(
        f"do_preprocess={shown(do_preprocess)} must be true or false; name the arguments after gen_config"
    )


def set_log_level(level: str) -> None:
    """Set the level of the logger ``jaxdeploy``, and show its lines on stderr. Raises ``ConfigError``."""
    names = logging.getLevelNamesMapping()
    if level.upper() not in names:
        raise ConfigError(f"log_level={level!r} is not one of DEBUG, INFO, WARNING, ERROR; take one of these")
    logger.setLevel(names[level.upper()])
    if not logger.hasHandlers():
        logger.addHandler(logging.StreamHandler())


def _template_named(name: str | None) -> str | None:
    """The built-in template of this name; LMDeploy 0.3 chose templates by the model's name."""
    if name is None:
        return None
    from jaxdeploy.chat_template.builtin import find_builtin

    if find_builtin(name) is not None:
        return name
    logger.warning("model_name=%r has no meaning here: the chat template is the checkpoint's own", name)
    return None


def _configs(given: GenConfigs, count: int, fields: dict[str, Any]) -> list[GenerationConfig]:
    """One config for each prompt, with single fields laid over it."""
    if "request_output_len" in fields:
        fields["max_new_tokens"] = fields.pop("request_output_len")
    over = {name: value for name, value in fields.items() if value is not None}
    listed: Sequence[Any] = given if isinstance(given, list | tuple) else [given] * count
    several = [config_of(GenerationConfig, one, "gen_config") for one in listed]
    if len(several) != count:
        raise ConfigError(
            f"gen_config has {len(several)} entries for {count} prompts; give one for each, or one for all"
        )
    return [config for one in several for config in split_settings(over, one)]


def _adapters(given: AdapterNames, count: int) -> list[str | None]:
    """One adapter for each prompt."""
    several = [given] * count if given is None or isinstance(given, str) else list(given)
    if len(several) != count:
        raise ConfigError(
            f"adapter_name has {len(several)} entries for {count} prompts; give one for each, or one for all"
        )
    return several


def _progress_bar(total: int, wanted: bool | None) -> Any:
    """A bar on stderr; where nobody said, only a terminal shows one, and only for several replies."""
    from tqdm import tqdm

    hidden = (True if total < 2 else None) if wanted is None else not wanted
    return tqdm(total=total, unit="reply", desc="replies", leave=False, disable=hidden)
