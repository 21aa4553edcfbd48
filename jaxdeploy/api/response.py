"""What the Python API gives back: a reply, and a conversation with its history."""

from __future__ import annotations

from dataclasses import dataclass, field

from jaxdeploy.errors import JaxdeployError
from jaxdeploy.messages import NO_SPECULATION, FinishReason, SpeculationCounts


@dataclass
class Response:
    """A reply, or one piece of it while it streams; LMDeploy's names.

    ``index`` is the place in the list that the call gives back: prompts in their order, the ``n`` alternatives of each
    side by side. ``session_id`` is the prompt's, shared by its alternatives. In a stream ``text``, ``token_ids`` and
    ``logprobs`` are the new piece and ``generate_token_len`` counts from the start. ``logprobs`` has one dict a token,
    token id → natural log-probability, the chosen token's among them; ``prompt_logprobs`` are the same for the prompt's
    tokens but the first, in a stream with the first piece. ``cached_tokens`` of the prompt were found in the KV cache
    and not computed again. ``speculation`` counts drafts. ``error`` is the reason if ``finish_reason`` is
    "error".
    """

    text: str
    generate_token_len: int
    input_token_len: int
    session_id: int
    finish_reason: FinishReason | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, float]] | None = None
    index: int = 0
    cached_tokens: int = 0
    prompt_logprobs: list[dict[int, float]] | None = None
    speculation: SpeculationCounts = NO_SPECULATION
    error: JaxdeployError | None = None

    def extend(self, piece: Response) -> Response:
        """Append the next piece of a stream, for callers who join pieces; LMDeploy's method."""
        self.text += piece.text
        self.generate_token_len = piece.generate_token_len
        self.finish_reason = piece.finish_reason
        self.cached_tokens = piece.cached_tokens
        self.speculation = piece.speculation
        self.error = piece.error
        self.token_ids += piece.token_ids
        if piece.logprobs is not None:
            self.logprobs = (self.logprobs or []) + piece.logprobs
        self.prompt_logprobs = piece.prompt_logprobs or self.prompt_logprobs
        return self

    def __str__(self) -> str:
        return self.text


@dataclass
class Session:
    """A conversation: ``history`` has its prompts and replies, ``response`` the last reply with its counts."""

    session_id: int
    history: list[tuple[str, str]] = field(default_factory=list)
    response: Response | None = None

    @property
    def messages(self) -> list[dict[str, str]]:
        """The history as chat messages."""
        return [
            {"role": role, "content": text}
            for turn in self.history
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]

    def __str__(self) -> str:
        return "\n".join(f"USER: {said}\nASSISTANT: {reply}" for said, reply in self.history)
