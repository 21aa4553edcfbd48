"""LMDeploy's piece form of a chat template: texts put before and after what each role says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxdeploy.errors import RequestError

ROUND = "{round}"
ALIASES = {"developer": "system"}


@dataclass(frozen=True)
class BuiltinTemplate:
    """One turn reads ``system + meta_instruction + eosys + user + text + eoh + assistant + reply + eoa + separator``.

    ``meta_instruction`` is the system prompt where the messages give none; None writes no system part at all, an
    empty text an empty one. ``{round}`` in ``user`` is the number of the turn. ``prompt_strip``: the prompt ends
    without the last space of ``assistant``, because the model writes that space as part of its first word.
    """

    system: str = ""
    meta_instruction: str | None = ""
    eosys: str = ""
    user: str = ""
    eoh: str = ""
    assistant: str = ""
    eoa: str = ""
    tool: str = ""
    eotool: str = ""
    separator: str = ""
    stop_words: tuple[str, ...] = ()
    capability: str = "chat"
    prompt_strip: bool = False

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        """The text of a conversation.

        With ``add_generation_prompt`` it ends where the model goes on: after ``assistant``, or inside the last
        message if that is the assistant's.

        Raises:
            RequestError: a message has a role or a content that the pieces cannot express.
        """
        turns = list(messages)
        if self.meta_instruction is not None and turns and turns[0].get("role") != "system":
            turns = [{"role": "system", "content": self.meta_instruction}, *turns]
        text = "".join(self._turns(turns))
        if not add_generation_prompt:
            return text
        if turns and turns[-1].get("role") == "assistant":
            return text.removesuffix(self.eoa + self.separator)
        return text + (self.assistant.removesuffix(" ") if self.prompt_strip else self.assistant)

    def _turns(self, messages: Iterable[Mapping[str, Any]]) -> Iterable[str]:
        rounds = 0
        for message in messages:
            before, after = self._around(message.get("role"))
            rounds += message.get("role") == "user"
            yield f"{before.replace(ROUND, str(rounds))}{plain_text(message)}{after}"

    def _around(self, role: Any) -> tuple[str, str]:
        around = {
            "system": (self.system, self.eosys),
            "user": (self.user, self.eoh),
            "assistant": (self.assistant, self.eoa + self.separator),
            "tool": (self.tool, self.eotool),
        }
        role = ALIASES.get(role, role)
        if role not in around or (role == "tool" and not self.tool):
            known = ", ".join(name for name in around if name != "tool" or self.tool)
            raise RequestError(f"role={role!r} is unknown to the chat template; use one of {known}")
        return around[role]


def plain_text(message: Mapping[str, Any]) -> str:
    """What a message says, its text parts joined; None counts as nothing said.

    Raises:
        RequestError: a part is no text.
    """
    content = message.get("content")
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, Sequence):
        return "".join(_part_text(part) for part in content)
    raise RequestError(f"content={content!r} must be text, or a list of parts; send the text alone")


def _part_text(part: Any) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else part
    raise RequestError(f"content part type={kind!r} cannot be read by this model; send text parts only")
