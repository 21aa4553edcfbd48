"""A machine for the pickle instructions that checkpoints are made of.

It replaces ``pickle.Unpickler``, which allocates memory for any memo index, and hashes and compares any objects that a
file asks it to. This machine calls only what its caller resolves, keeps its memo in a dict, and takes only texts and
numbers as keys. Its time and memory are proportional to the length of the pickle.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from typing import Any

MAX_INSTRUCTIONS = 3_000_000
"""Instructions of a pickle; a tensor takes about 60."""

_LITERALS = frozenset(
    {
        *("BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4", "BINFLOAT", "FLOAT"),
        *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE", "STRING", "BINSTRING", "SHORT_BINSTRING"),
        *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    }
)
"""Instructions that push their argument."""

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_KEYS = (str, bytes, int, float, type(None))


class Mark:
    """Where the items of a tuple, list or dict begin on the stack."""


class PickleMachine:
    """Runs one pickle.

    ``find_global`` resolves a module and a name, ``load_persistent`` a persistent id. What ``find_global`` returns is
    called with the arguments in the pickle.
    """

    def __init__(self, find_global: Callable[[str, str], Any], load_persistent: Callable[[Any], Any]) -> None:
        self._find_global = find_global
        self._load_persistent = load_persistent
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self, pickled: bytes) -> Any:
        """Return the object that ``pickled`` describes.

        Raises ``ValueError``: an instruction is unknown, has no place in a checkpoint or lacks its operands.
        """
        for count, (instruction, argument, _) in enumerate(pickletools.genops(pickled)):
            if count > MAX_INSTRUCTIONS:
                raise ValueError(f"it has more than {MAX_INSTRUCTIONS} instructions")
            if instruction.name == "STOP":
                return self._pop()
            self._step(instruction.name, argument)
        raise ValueError("it has no end")

    def _step(self, name: str, argument: Any) -> None:
        if name in _LITERALS:
            self._stack.append(argument)
        elif name in _CONSTANTS:
            self._stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            self._stack.append(_EMPTY[name]())
        else:
            self._combine(name, argument)

    def _combine(self, name: str, argument: Any) -> None:
        """Instructions that take their operands from the stack or the memo."""
        push = self._stack.append
        match name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                push(Mark)
            case "BINPUT" | "LONG_BINPUT" | "PUT":
                self._memo[int(argument)] = self._top()
            case "MEMOIZE":
                self._memo[len(self._memo)] = self._top()
            case "BINGET" | "LONG_BINGET" | "GET":
                push(self._remembered(int(argument)))
            case "TUPLE":
                push(tuple(self._marked()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                push(tuple(reversed([self._pop() for _ in range(int(name[-1]))])))
            case "LIST":
                push(self._marked())
            case "DICT":
                items = self._marked()
                push({})
                self._set(items)
            case "APPEND" | "APPENDS":
                items = [self._pop()] if name == "APPEND" else self._marked()
                self._of(list).extend(items)
            case "SETITEM":
                value, key = self._pop(), self._pop()
                self._set([key, value])
            case "SETITEMS":
                self._set(self._marked())
            case "GLOBAL":
                push(self._find_global(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                found, module = self._pop(), self._pop()
                push(self._find_global(str(module), str(found)))
            case "BINPERSID":
                push(self._load_persistent(self._pop()))
            case "REDUCE":
                arguments, function = self._pop(), self._pop()
                push(function(*arguments))
            case "INST":
                arguments = self._marked()
                push(self._find_global(*argument.split(" ", 1))(*arguments))
            case "BUILD":
                self._pop()  # attributes, such as the _metadata of a state dict, are not kept
                self._of(dict)
            case _:
                raise ValueError(f"the instruction {name} is not used by checkpoints")

    def _pop(self) -> Any:
        value = self._top()
        self._stack.pop()
        return value

    def _top(self) -> Any:
        if not self._stack or self._stack[-1] is Mark:
            raise ValueError("an instruction lacks an operand")
        return self._stack[-1]

    def _of(self, kind: type[Any]) -> Any:
        """Return the object on top, which must be a ``kind``."""
        if not isinstance(self._top(), kind):
            raise ValueError(f"a {kind.__name__} is expected")
        return self._top()

    def _marked(self) -> list[Any]:
        """Remove the last mark and the objects above it; return these objects."""
        items = []
        while self._stack and self._stack[-1] is not Mark:
            items.append(self._stack.pop())
        if not self._stack:
            raise ValueError("a mark is missing")
        self._stack.pop()
        return items[::-1]

    def _set(self, items: list[Any]) -> None:
        """Put alternating keys and values into the dict on top; leave out entries with other keys."""
        if len(items) % 2:
            raise ValueError("a key has no value")
        found = self._of(dict)
        found.update((key, value) for key, value in zip(items[::2], items[1::2], strict=True) if type(key) in _KEYS)

    def _remembered(self, index: int) -> Any:
        if index not in self._memo:
            raise ValueError(f"nothing is remembered as {index}")
        return self._memo[index]
