"""One reply to generate: what the generator is asked, and what is made of its answers."""

from __future__ import annotations

from dataclasses import dataclass

from jaxdeploy.api.response import Response
from jaxdeploy.generation.reply import Reply
from jaxdeploy.generation.resolved import ResolvedGeneration
from jaxdeploy.messages import PromptResult, Request, TextOutput, TokenLogprob


@dataclass(frozen=True)
class Job:
    """One reply to generate: the ``alternative``-th of ``how.n`` for a prompt.

    ``adapter`` is the LoRA adapter that makes it. ``goes_on``: the session's next prompt is expected to go on from it.
    """

    ids: tuple[int, ...]
    session_id: int
    index: int
    how: ResolvedGeneration
    alternative: int
    adapter: str | None = None
    goes_on: bool = False

    def request(self, request_id: str, *, embed: bool = False) -> Request:
        """Return the request for the generator."""
        return Request(
            request_id,
            self.ids,
            self.how.alternatives()[self.alternative],
            session_id=str(self.session_id) if self.goes_on else None,
            embed=embed,
            adapter=self.adapter,
            text=self.how.text,
        )

    def response(self, output: TextOutput | Reply, num_tokens: int) -> Response:
        """Return an output, or the whole reply, in the caller's form; ``num_tokens`` were generated so far."""
        asked = self.how.sampling.logprobs is not None
        return Response(
            text=output.text,
            generate_token_len=num_tokens,
            input_token_len=len(self.ids),
            session_id=self.session_id,
            finish_reason=output.finish_reason,
            token_ids=list(output.token_ids),
            logprobs=[_logprobs(token) for token in output.logprobs] if asked else None,
            index=self.index,
            cached_tokens=output.cached_tokens,
            prompt_logprobs=self._prompt_logprobs(output.prompt),
            speculation=output.speculation,
            error=output.error,
        )

    def _prompt_logprobs(self, result: PromptResult | None) -> list[dict[int, float]] | None:
        if result is None or self.how.sampling.prompt_logprobs is None:
            return None
        return [_logprobs(token) for token in result.logprobs]


def _logprobs(token: TokenLogprob) -> dict[int, float]:
    return {**dict(token.top), token.token_id: token.logprob}
