"""The blocks of the KV cache: who holds them, and which prefixes of which version they keep.

A full block is known by a key: the hash of its version, its tokens and all tokens before it. It can serve any sequence
that begins alike under the same version, and none under another. Blocks that nobody holds keep their content until
they are wanted for something else, the one that was given back first going first.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from loramill.errors import EngineFault


def root_key(version: str | None) -> bytes:
    """What the keys of all of a version's prefixes begin with."""
    return hashlib.sha256(b"base" if version is None else b"version " + version.encode()).digest()


def block_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The key of a full block by the key of the one before it (the first: `root_key`) and its tokens."""
    return hashlib.sha256(parent + array("q", tokens).tobytes()).digest()


class BlockPool:
    """Numbered blocks, each free or held by one or more sequences."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(reversed(range(count)))
        self._ref_counts = [0] * count
        # In the order in which they were given back.
        self._evictable: OrderedDict[int, None] = OrderedDict()
        self._block_by_key: dict[bytes, int] = {}
        self._key_by_block: dict[int, bytes] = {}

    @property
    def available(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free) + len(self._evictable)

    def match(self, keys: Iterable[bytes]) -> list[int]:
        """The blocks of the longest known prefix of a chain of keys."""
        found = []
        for key in keys:
            block = self._block_by_key.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def needed(self, blocks: Sequence[int], new_count: int) -> int:
        """Of the available blocks, how many it takes to hold these and `more`."""
        return new_count + sum(not self._ref_counts[block] for block in blocks)

    def incref(self, blocks: Sequence[int]) -> None:
        """One more sequence holds these."""
        for block in blocks:
            if not self._ref_counts[block]:
                del self._evictable[block]
            self._ref_counts[block] += 1

    def allocate(self, count: int) -> list[int]:
        """So many blocks for one sequence to write; the caller knows that they are available."""
        taken = [self._free.pop() if self._free else self._evict_oldest() for _ in range(count)]
        for block in taken:
            self._ref_counts[block] = 1
        return taken

    def free(self, blocks: Sequence[int]) -> None:
        """One sequence less holds these, in its order; the end of a prefix is of use to fewer than its beginning."""
        for block in reversed(blocks):
            self._ref_counts[block] -= 1
            if not self._ref_counts[block]:
                if block in self._key_by_block:
                    self._evictable[block] = None
                else:
                    self._free.append(block)

    def cache(self, block: int, key: bytes) -> None:
        """A block is full, under a key; where another already has that key, that one stays the one to share."""
        if key not in self._block_by_key:
            self._block_by_key[key] = block
            self._key_by_block[block] = key

    def check_integrity(self, ref_counts: dict[int, int]) -> None:
        """Compares the books with how many sequences hold each block.

        Raises:
            EngineFault: they differ, a block is lost, or a key leads to a block that doesn't know it.
        """
        mine = {block: count for block, count in enumerate(self._ref_counts) if count}
        if mine != ref_counts:
            raise EngineFault(f"Blocks are held {ref_counts} times; the pool has {mine}.")
        if sorted([*self._free, *self._evictable, *mine]) != list(range(self.count)):
            raise EngineFault(f"Of {self.count} blocks {len(mine)} are held, {self.available} available.")
        if (
            self._key_by_block != {block: key for key, block in self._block_by_key.items()}
            or not self._key_by_block.keys() >= self._evictable.keys()
        ):
            raise EngineFault("The prefix cache's keys and blocks don't belong together.")

    def _evict_oldest(self) -> int:
        block, _ = self._evictable.popitem(last=False)
        del self._block_by_key[self._key_by_block.pop(block)]
        return block
