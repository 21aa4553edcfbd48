"""One class collects replies for HTTP, the pipeline and the terminal chat."""

from __future__ import annotations

import pytest

from jaxdeploy.chat.session import ChatReply
from jaxdeploy.errors import RequestError
from jaxdeploy.generation.prompt import prompt_ids
from jaxdeploy.generation.reply import Reply
from jaxdeploy.messages import FinishReason, SpeculationCounts, TextOutput, TokenLogprob
from jaxdeploy.server.conversation import ParsedReply
from jaxdeploy.server.parsers import think
from jaxdeploy.server.reply_parser import ReplyParser, parsers_for

OUTPUTS = (
    TextOutput("r", "", (), cached_tokens=3),
    TextOutput("r", "<think>a", (1, 2), (TokenLogprob(1, -0.5), TokenLogprob(2, -1.0)), cached_tokens=3),
    TextOutput(
        "r", "</think>b", (4,), finish_reason=FinishReason.STOP, stop_word="c", speculation=SpeculationCounts(1)
    ),
)


def added(reply: Reply) -> Reply:
    for output in OUTPUTS:
        reply.add(output)
    return reply


@pytest.mark.parametrize("keeps_content", [True, False])
def test_a_reply_is_the_sum_of_its_outputs(keeps_content: bool) -> None:
    reply = added(Reply(keeps_content=keeps_content))
    assert (reply.num_tokens, reply.cached_tokens, reply.finish_reason) == (3, 3, FinishReason.STOP)
    assert (reply.stop_word, reply.speculation) == ("c", SpeculationCounts(1))
    assert reply.started_at <= (reply.first_token_at or 0.0) <= reply.updated_at
    assert reply.text == ("<think>a</think>b" if keeps_content else "")
    assert (reply.token_ids, len(reply.logprobs)) == (([1, 2, 4], 2) if keeps_content else ([], 0))


def test_every_face_of_the_project_collects_with_it() -> None:
    parser = ReplyParser(parsers_for(None, think, thinking=False))
    parsed = ParsedReply(parser=parser)
    added(parsed)
    assert (parsed.thought, parsed.text, parsed.token_ids) == ("a", "b", [1, 2, 4])
    assert isinstance(parsed, Reply)
    assert added(ChatReply()).text == "<think>a</think>b"


def test_a_prompt_without_tokens_begins_with_the_first_token_of_texts() -> None:
    assert prompt_ids([5], 1, "x") == (5,)
    assert prompt_ids([], 1, "") == (1,)
    with pytest.raises(RequestError, match="prompt='' has no tokens, and this model has no token to begin with"):
        prompt_ids([], None, "")
