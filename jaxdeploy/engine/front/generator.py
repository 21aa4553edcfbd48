"""An engine with text: the tokenizer and chat template for prompts, decoding and stop words for replies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache, partial
from pathlib import Path
from types import TracebackType
from typing import Any

from jaxdeploy.chat_template import ChatTemplate
from jaxdeploy.checkpoint.source import read_hf_config, resolve_model
from jaxdeploy.config import ChatTemplateConfig, EngineConfig
from jaxdeploy.engine.checks import check_name
from jaxdeploy.engine.failure import failure
from jaxdeploy.engine.front.engine_like import EngineLike
from jaxdeploy.engine.front.supervisor import Supervisor
from jaxdeploy.engine.front.text_stream import TextStream
from jaxdeploy.generation.defaults import read_generation_defaults
from jaxdeploy.generation.resolved import ResolvedGeneration, Settings, eos_token_ids, resolve
from jaxdeploy.grammar.response_format import grammar_of
from jaxdeploy.messages import (
    FinishReason,
    Request,
    StepOutput,
    TextOutput,
)
from jaxdeploy.models.registry import architecture_of
from jaxdeploy.tokenizer import Tokenizer

MAX_CACHED_WORDS = 256
"""Stop words whose token ids are kept."""


class Generator:
    """Turns text requests into text outputs, one engine step at a time. One thread calls it.

    ``generation_defaults`` come from the checkpoint's ``generation_config.json``; ``eos_token_ids`` are all ids that
    end a reply; ``session_len`` is in tokens.
    """

    def __init__(
        self,
        engine: EngineLike,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        defaults: Mapping[str, Any],
        eos: frozenset[int],
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.template = template
        self.generation_defaults = defaults
        self.eos_token_ids = eos
        self.session_len = engine.limits.session_len
        self._streams: dict[str, tuple[Request, TextStream]] = {}

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        config: EngineConfig,
        *,
        chat_template: ChatTemplateConfig | str | None = None,
        progress: bool = False,
        own_process: bool = False,
    ) -> Generator:
        """Load ``model``, a local folder or a hub id; ``progress`` shows bars on stderr.

        ``own_process`` runs the engine in one, and restarts it when it dies (``Supervisor``).

        Raises ``ModelNotFoundError``, ``CheckpointError``, ``UnsupportedModelError``, ``ConfigError``.
        """
        folder = resolve_model(
            model,
            revision=config.revision,
            download_dir=config.download_dir,
            weights=config.load_format != "dummy",
        )
        hf = read_hf_config(folder, config.model_format)
        architecture = architecture_of(hf)
        tokenizer = Tokenizer.load(folder)
        template = ChatTemplate.resolve(chat_template, tokenizer, architecture)
        defaults = read_generation_defaults(folder)
        ends = eos_token_ids(tokenizer, hf, defaults)
        build = partial(_build, folder, hf, config, ends, progress)
        engine: EngineLike = Supervisor(build) if own_process else build()
        return cls(engine, tokenizer, template, defaults, ends)

    def resolve(
        self,
        settings: Settings,
        *,
        chat: bool,
        to_grammar: Callable[[Mapping[str, Any]], str | None] = grammar_of,
    ) -> ResolvedGeneration:
        """Fill in the defaults of the model, for a ``chat`` also its stop words. Raises as ``resolve``."""
        return resolve(
            settings,
            self.generation_defaults,
            self.tokenizer,
            eos_token_ids=self.eos_token_ids,
            template_stops=self.template.stop_words if chat else (),
            to_grammar=to_grammar,
            encode_word=self._encode_word,
        )

    @cached_property
    def _encode_word(self) -> Callable[[str], Sequence[int]]:
        """Encodes stop words, which are often the same."""
        return lru_cache(MAX_CACHED_WORDS)(partial(self.tokenizer.encode, add_bos=False))

    @property
    def has_work(self) -> bool:
        """Whether ``step`` has anything to do."""
        return self.engine.has_work

    def submit(self, request: Request) -> None:
        """Queue a request. Raises ``ContextLengthError`` and other ``RequestError``s; nothing is queued then."""
        if request.request_id in self._streams:
            check_name(request, True)
        stream = self._stream_of(request)
        self.engine.add(request)
        self._streams[request.request_id] = (request, stream)

    def step(self) -> list[TextOutput]:
        """Run one engine step.

        An engine in another process may be ahead: outputs of a request that has ended here are dropped. A fault in the
        text of one request ends that request with ``FinishReason.ERROR``.
        """
        outputs = []
        for output in self.engine.step():
            if output.request_id not in self._streams:
                continue
            made = self._text_or_failure(output)
            if made.finish_reason is not None:
                del self._streams[output.request_id]
                if output.finish_reason is None:
                    self.engine.abort(output.request_id)
            outputs.append(made)
        return outputs

    def abort(self, request_id: str) -> None:
        """Drop a request and free its resources."""
        self._streams.pop(request_id, None)
        self.engine.abort(request_id)

    def wake(self) -> None:
        """Have a ``step`` that waits return; any thread may call it."""
        self.engine.wake()

    def close(self) -> None:
        """Give the device memory back."""
        self._streams.clear()
        self.engine.close()

    def __enter__(self) -> Generator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _stream_of(self, request: Request) -> TextStream:
        options = request.text
        decoder = self.tokenizer.detokenizer(
            skip_special_tokens=options.skip_special_tokens,
            spaces_between_special_tokens=options.spaces_between_special_tokens,
            prompt_ids=request.prompt_token_ids,
        )
        return TextStream(
            decoder,
            options.stop_words,
            include_stop=options.include_stop,
            min_new_tokens=request.sampling.min_new_tokens,
        )

    def _text_or_failure(self, output: StepOutput) -> TextOutput:
        try:
            return self._text_output(output)
        except Exception as error:  # a tokenizer may raise anything
            reason = failure(output.request_id, error)
            return TextOutput(output.request_id, "", (), finish_reason=FinishReason.ERROR, error=reason)

    def _text_output(self, output: StepOutput) -> TextOutput:
        request, stream = self._streams[output.request_id]
        reason = output.finish_reason
        shown = output.token_ids
        if reason is FinishReason.STOP and not request.text.include_stop:
            shown = shown[:-1]
        text, tokens = "", output.token_ids
        for count, token in enumerate(shown, 1):
            text += stream.push(token)
            if stream.stopped:
                tokens = tokens[:count]
                break
        if stream.stopped or reason is not None:
            text += stream.finish()
            reason = FinishReason.STOP if stream.stopped else reason
        return TextOutput(
            output.request_id,
            text,
            tokens,
            logprobs=output.logprobs[: len(tokens)],
            finish_reason=reason,
            cached_tokens=output.cached_tokens,
            stop_word=stream.stop_word,
            prompt=output.prompt,
            speculation=output.speculation,
            error=output.error if reason is FinishReason.ERROR else None,
        )


def _build(
    folder: Path, hf: Mapping[str, Any], config: EngineConfig, ends: frozenset[int], progress: bool
) -> EngineLike:
    """``build_engine``. Its import of JAX takes seconds: errors before it are reported at once."""
    from jaxdeploy.engine.front.build import build_engine

    return build_engine(folder, hf, config, ends=ends, progress=progress)
