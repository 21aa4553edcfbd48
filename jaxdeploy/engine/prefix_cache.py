"""Which block holds which tokens behind which others: prompts that begin alike share their blocks."""

from __future__ import annotations

import sys

from jaxdeploy.engine.block_manager import BlockManager
from jaxdeploy.engine.sequence import Block, Sequence

_Key = tuple[Block | None, tuple[int, ...]]
"""The block before, and the tokens in this one. So a key stands for all tokens from the beginning on."""


class PrefixCache:
    """Finds and notes whole blocks by their tokens; hashes narrow the search, tokens decide.

    A block is noted as soon as a step is scheduled that fills it: sequences later in the same step may attend to it
    already, since a step writes all its keys and values before anything attends to them.

    ``longest_prompt``: only sequences whose prompts have at most so many tokens take part; 0 turns sharing off.
    """

    def __init__(self, blocks: BlockManager, block_size: int, longest_prompt: int = sys.maxsize) -> None:
        self.asked = self.found = 0
        self._blocks, self._size, self._longest = blocks, block_size, longest_prompt
        self._known: dict[_Key, Block] = {}
        self._keys: dict[int, _Key] = {}

    def serves(self, sequence: Sequence) -> bool:
        """Whether a sequence shares blocks with others."""
        return sequence.prompt_length <= self._longest

    def hold(self, sequence: Sequence) -> list[Block]:
        """Hold the blocks that have the first tokens of a sequence; one token at least is left to be computed."""
        if not self.serves(sequence):
            return []
        chain: list[Block] = []
        for index in range((len(sequence.token_ids) - 1) // self._size):
            block = self._known.get(self._key(sequence, index, chain[-1] if chain else None))
            if block is None:
                break
            chain.append(block)
        return self._blocks.hold(chain)

    def note(self, sequence: Sequence, computed: int) -> None:
        """Note the blocks that are full once ``computed`` tokens of a sequence are.

        Where another block has the same tokens already, that one stays known.
        """
        if not self.serves(sequence):
            return
        for index in range(len(sequence.noted), computed // self._size):
            key = self._key(sequence, index, sequence.noted[-1] if sequence.noted else None)
            block = self._known.get(key)
            if block is None or not self._blocks.is_valid(block):
                block = sequence.blocks[index]
                self._forget(block.index)
                self._known[key], self._keys[block.index] = block, key
            sequence.noted.append(block)

    def _forget(self, index: int) -> None:
        """What a physical block held before."""
        key = self._keys.pop(index, None)
        if key is not None and (known := self._known.get(key)) and known.index == index:
            del self._known[key]

    def _key(self, sequence: Sequence, index: int, before: Block | None) -> _Key:
        return before, tuple(sequence.token_ids[index * self._size : (index + 1) * self._size])
