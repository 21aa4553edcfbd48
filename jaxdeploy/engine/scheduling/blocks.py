"""Handles of KV blocks, and the nodes under which the prefix cache finds them."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

Start = tuple[str, Hashable]
"""What cached blocks depend on before their tokens: the request's salt, and the root of its adapter or ``None``."""


@dataclass(frozen=True, slots=True)
class Block:
    """A physical KV block with the content that it had when it was handed out."""

    index: int
    """Place in the pools."""
    stamp: int
    """Counts how often the block was handed out. The content is valid while the manager has the same stamp."""


@dataclass(eq=False, slots=True)
class Node:
    """A full block of tokens in the tree of all cached prefixes."""

    before: Node | Start = field(repr=False)
    """The block before it, or the start of the sequence."""
    tokens: tuple[int, ...]
    block: Block | None = None
    """Keys and values on the device, if they are there."""
    host_block: int | None = None
    """Index of a copy in host memory, if there is one."""
