"""The conversation loop of the terminal chat."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any

from jaxdeploy.chat.session import ChatReply, Conversation, Speaker, stream_reply
from jaxdeploy.config import GenerationConfig
from jaxdeploy.errors import ContextLengthError, JaxdeployError, RequestError
from jaxdeploy.messages import FinishReason
from jaxdeploy.settings import nearest

HELP = """\
/help          show this
/reset         forget the conversation (also: end)
/system TEXT   set the system prompt and begin anew; without TEXT, show it
/save FILE     write the conversation to a JSON file
/exit          leave (also: exit, Ctrl-D)
Ctrl-C stops a reply. Alt-Enter, or a backslash at the end of a line, begins a new line."""


class Chat:
    """The conversation loop: replies go to stdout, everything else to stderr."""

    def __init__(self, pipe: Speaker, gen_config: GenerationConfig, conversation: Conversation) -> None:
        from rich.console import Console

        self._pipe = pipe
        self._gen_config = gen_config
        self._conversation = conversation
        self._console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
        self._commands: dict[str, Callable[[str], bool]] = {
            "/help": self._help,
            "/reset": self._reset,
            "/system": self._system,
            "/save": self._save,
            "/exit": self._exit,
        }

    def answer_once(self, text: str) -> bool:
        """Print the reply to ``text`` and one newline; False if Ctrl-C stopped it. Raises ``RequestError``."""
        return self._reply(text).finish_reason is not FinishReason.ABORT

    def run(self, read: Callable[[], str], model: str) -> None:
        """Converse until the user leaves."""
        self.note(f"{model}: /help shows the commands, Ctrl-C stops a reply, /exit leaves")
        going_on = True
        while going_on:
            try:
                going_on = self.take(read().strip())
            except EOFError:
                going_on = False
            except KeyboardInterrupt:
                self.note("/exit leaves")

    def take(self, text: str) -> bool:
        """Run a command or answer a prompt. Returns false if the user leaves. The chat continues after an error."""
        word, _, rest = text.partition(" ")
        word = {"end": "/reset", "exit": "/exit"}.get(text, word)
        try:
            if word in self._commands:
                return self._commands[word](rest.strip())
            if re.fullmatch(r"/[a-z_]+", word):
                raise RequestError(_unknown_command(word, self._commands))
            if text:
                self._converse(text)
        except JaxdeployError as error:
            hint = "; /reset begins anew" if isinstance(error, ContextLengthError) else ""
            self._console.print(f"error: {error}{hint}", style="red")
        return True

    def note(self, text: str) -> None:
        """A dim line on stderr."""
        self._console.print(text, style="dim")

    def _converse(self, text: str) -> None:
        reply = self._reply(text)
        self._conversation.remember(text, reply.text)

    def _reply(self, text: str) -> ChatReply:
        reply = stream_reply(self._pipe, self._conversation.prompt(text), self._gen_config, _write)
        if not reply.text.endswith("\n"):
            _write("\n")
        self.note(reply.summary())
        return reply

    def _help(self, rest: str) -> bool:
        self.note(HELP)
        return True

    def _reset(self, rest: str) -> bool:
        self._conversation.messages.clear()
        self.note("the conversation begins anew")
        return True

    def _system(self, rest: str) -> bool:
        if not rest:
            self.note(f"system prompt: {self._conversation.system or 'as the chat template has it'}")
            return True
        self._conversation.system = rest
        return self._reset("")

    def _save(self, rest: str) -> bool:
        if not rest:
            raise RequestError("/save needs a file's name; e.g. /save chat.json")
        self._conversation.save(rest)
        self.note(f"saved to {rest}")
        return True

    def _exit(self, rest: str) -> bool:
        return False


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _unknown_command(word: str, known: Any) -> str:
    return "; ".join(filter(None, [f"command={word} is unknown", nearest(word, known), "/help lists them"]))
