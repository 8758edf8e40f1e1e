"""A cache of prompt prefixes in host memory: blocks, least recently used first out. Knows nothing about time or bytes.

A block's name stands for all tokens up to its end (as in Mooncake's traces), so a prompt's blocks can be reused up to
the first one that is not there. Of one prompt, later blocks count as used before earlier ones: a prefix is evicted from
its end.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class PrefixCache:
    """Names of the blocks that are held, in the order in which they will go."""

    def __init__(self) -> None:
        self._blocks: OrderedDict[int, None] = OrderedDict()
        self.evicted = 0

    def __len__(self) -> int:
        return len(self._blocks)

    def held(self, blocks: Sequence[int]) -> int:
        """How many of a prompt's first blocks are here; nothing is touched."""
        known = self._blocks
        for count, block in enumerate(blocks):
            if block not in known:
                return count
        return len(blocks)

    def use(self, blocks: Sequence[int]) -> int:
        """The same, and they become the most recently used."""
        count = self.held(blocks)
        self._touch(blocks[:count])
        return count

    def add(self, blocks: Sequence[int], limit: int) -> None:
        """Put a prompt's first blocks in, at most `limit` of them, and evict what is too much."""
        self._touch(blocks[:limit])
        self.shrink(limit)

    def shrink(self, limit: int) -> None:
        """Evict until at most `limit` blocks are left."""
        known = self._blocks
        while len(known) > limit:
            known.popitem(last=False)
            self.evicted += 1

    def _touch(self, blocks: Sequence[int]) -> None:
        known = self._blocks
        for block in reversed(blocks):
            known[block] = None
            known.move_to_end(block)
