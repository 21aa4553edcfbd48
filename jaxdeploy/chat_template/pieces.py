"""LMDeploy's piece form of a chat template: texts put before and after what each role says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxdeploy.chat_template.conversation import Ending, text_of
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

    def render(self, messages: Sequence[Mapping[str, Any]], how: Ending) -> str:
        """The text of checked messages.

        Raises:
            RequestError: a message has a role, or calls, that the pieces cannot express.
        """
        turns = list(messages)
        if self.meta_instruction is not None and ALIASES.get(turns[0]["role"], turns[0]["role"]) != "system":
            turns = [{"role": "system", "content": self.meta_instruction}, *turns]
        text = "".join(self._turns(turns))
        if how.continues:
            return text.removesuffix(self.eoa + self.separator)
        if not how.begins:
            return text
        return text + (self.assistant.removesuffix(" ") if self.prompt_strip else self.assistant)

    def _turns(self, messages: Iterable[Mapping[str, Any]]) -> Iterable[str]:
        rounds = 0
        for message in messages:
            if "tool_calls" in message:
                raise RequestError("tool_calls have no place in a built-in chat template; leave them out")
            before, after = self._around(message["role"])
            rounds += message["role"] == "user"
            yield f"{before.replace(ROUND, str(rounds))}{text_of(message)}{after}"

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
