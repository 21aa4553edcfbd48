"""The synchronous Python API: ``pipeline("MODEL")`` gives an object that answers prompts."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from jaxdeploy.api.call_options import AdapterNames, CallOptions, GenConfigs
from jaxdeploy.api.embedding import pooled
from jaxdeploy.api.jobs import Job
from jaxdeploy.api.prompts import Prompts, as_list, encode
from jaxdeploy.api.response import Response, Session
from jaxdeploy.api.streams import Streams
from jaxdeploy.config import GenerationConfig
from jaxdeploy.errors import RequestError
from jaxdeploy.generation.reply import Reply
from jaxdeploy.messages import PromptResult, TextOutput

if TYPE_CHECKING:
    from jaxdeploy.chat_template import ChatTemplate
    from jaxdeploy.engine.front.generator import Generator
    from jaxdeploy.tokenizer import Tokenizer


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
        call = CallOptions.of_call(gen_config, do_preprocess, adapter_name, options)
        jobs, single = self._jobs(prompts, call)
        replies = [Reply() for _ in jobs]
        with _progress_bar(len(jobs), use_tqdm) as bar:
            for job, output in self._outputs(jobs):
                replies[job.index].add(output)
                bar.update(output.finish_reason is not None)
        responses = [job.response(reply, reply.num_tokens) for job, reply in zip(jobs, replies, strict=True)]
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
        call = CallOptions.of_call(gen_config, do_preprocess, adapter_name, options)
        return self._stream(self._jobs(prompts, call)[0])

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
        jobs, _ = self._jobs(texts, CallOptions(config, do_preprocess=False, adapter_name=adapter_name))
        return [pooled(result, pooling, normalize=normalize) for result in self._prompt_results(jobs)]

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
        jobs, _ = self._jobs(prompts, CallOptions(config, do_preprocess=False, adapter_name=adapter_name))
        scores = [result.logprobs for result in self._prompt_results(jobs)]
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
        self, prompt: str, session: Session, gen_config: GenConfigs, options: Mapping[str, Any]
    ) -> Iterator[Response]:
        messages = [*session.messages, {"role": "user", "content": prompt}]
        jobs, _ = self._jobs(messages, CallOptions.of(gen_config, {**options, "session_id": session.session_id}))
        return self._remember(prompt, session, dataclasses.replace(jobs[0], goes_on=True))

    def _remember(self, prompt: str, session: Session, job: Job) -> Iterator[Response]:
        reply = Reply()
        for _, output in self._outputs([job]):
            reply.add(output)
            yield job.response(output, reply.num_tokens)
        session.response = job.response(reply, reply.num_tokens)
        session.history.append((prompt, reply.text))

    def _jobs(self, prompts: Prompts, call: CallOptions) -> tuple[list[Job], bool]:
        """Return a job for each alternative of each prompt, and whether there is a single prompt."""
        several, single = as_list(prompts)
        configs, adapters = call.configs(len(several)), call.adapters(len(several))
        jobs: list[Job] = []
        for prompt, config, adapter in zip(several, configs, adapters, strict=True):
            session = next(self._session_ids) if call.session_id is None else call.session_id
            made = self.generator
            ids = encode(prompt, made.tokenizer, made.template, do_preprocess=call.do_preprocess, **call.ending)
            how = made.resolve(config, chat=call.do_preprocess)
            jobs += [Job(ids, session, len(jobs) + index, how, index, adapter) for index in range(how.n)]
        return jobs, single

    def _prompt_results(self, jobs: list[Job]) -> list[PromptResult]:
        """Run ``jobs`` and return the results of their prompts. Replies are dropped."""
        names = {next(self._names): job for job in jobs}
        results: dict[int, PromptResult] = {}
        for output in self._streams.read([job.request(name, embed=True) for name, job in names.items()]):
            if output.error is not None:
                raise output.error
            if output.prompt is not None:
                results[names[output.request_id].index] = output.prompt
        return [results[job.index] for job in jobs]

    def _stream(self, jobs: list[Job]) -> Iterator[Response]:
        lengths = [0] * len(jobs)
        for job, output in self._outputs(jobs):
            lengths[job.index] += len(output.token_ids)
            yield job.response(output, lengths[job.index])

    def _outputs(self, jobs: list[Job]) -> Iterator[tuple[Job, TextOutput]]:
        """Run ``jobs`` and yield their outputs. ``stop_session`` finds them meanwhile."""
        by_id = {next(self._names): job for job in jobs}
        for request_id, job in by_id.items():
            self._running.setdefault(job.session_id, []).append(request_id)
        try:
            for output in self._streams.read([job.request(name) for name, job in by_id.items()]):
                yield by_id[output.request_id], output
        finally:
            for request_id, job in by_id.items():
                self._forget(job.session_id, request_id)

    def _forget(self, session_id: int, request_id: str) -> None:
        names = self._running[session_id]
        names.remove(request_id)
        if not names:
            del self._running[session_id]


def _progress_bar(total: int, wanted: bool | None) -> Any:
    """A bar on stderr; where nobody said, only a terminal shows one, and only for several replies."""
    from tqdm import tqdm

    hidden = (True if total < 2 else None) if wanted is None else not wanted
    return tqdm(total=total, unit="reply", desc="replies", leave=False, disable=hidden)
