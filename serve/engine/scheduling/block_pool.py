"""The blocks of the KV cache: which sequences hold them, and which prefixes of which version they contain.

A full block has a key: the hash of its version, its tokens and all tokens before it. It can serve any sequence that
starts with the same tokens under the same version, and none under another. Blocks that no sequence holds keep their
content until they are needed for something else; the one that was freed first is reused first.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from loramill.errors import EngineFault


def root_key(version: str | None) -> bytes:
    """The parent key of the first block of every sequence of a version."""
    return hashlib.sha256(b"base" if version is None else b"version " + version.encode()).digest()


def block_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The key of a full block, by the key of the block before it (for the first block, `root_key`) and its tokens."""
    return hashlib.sha256(parent + array("q", tokens).tobytes()).digest()


class BlockPool:
    """Numbered blocks, each free or held by one or more sequences.

    Attributes:
        count: Number of blocks.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(reversed(range(count)))
        self._ref_counts = [0] * count
        # Free blocks with a key, in the order in which they were freed.
        self._evictable: OrderedDict[int, None] = OrderedDict()
        self._block_by_key: dict[bytes, int] = {}
        self._key_by_block: dict[int, bytes] = {}

    @property
    def available(self) -> int:
        """Number of blocks that no sequence holds."""
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
        """How many of the available blocks it takes to hold these and `new_count` new ones."""
        return new_count + sum(not self._ref_counts[block] for block in blocks)

    def incref(self, blocks: Sequence[int]) -> None:
        """Adds a holder to each of these blocks."""
        for block in blocks:
            if not self._ref_counts[block]:
                del self._evictable[block]
            self._ref_counts[block] += 1

    def allocate(self, count: int) -> list[int]:
        """Takes blocks for one sequence to write; the caller makes sure that as many are available."""
        taken = [self._free.pop() if self._free else self._evict_oldest() for _ in range(count)]
        for block in taken:
            self._ref_counts[block] = 1
        return taken

    def free(self, blocks: Sequence[int]) -> None:
        """Removes a holder from each of these blocks, in a sequence's order.

        The end of a prefix is reused first: fewer sequences share it than its start.
        """
        for block in reversed(blocks):
            self._ref_counts[block] -= 1
            if not self._ref_counts[block]:
                if block in self._key_by_block:
                    self._evictable[block] = None
                else:
                    self._free.append(block)

    def cache(self, block: int, key: bytes) -> None:
        """Makes a full block shareable under its key, unless another block already is."""
        if key not in self._block_by_key:
            self._block_by_key[key] = block
            self._key_by_block[block] = key

    def check_integrity(self, ref_counts: dict[int, int]) -> None:
        """Compares the reference counts with the number of sequences that hold each block.

        Raises:
            EngineFault: They differ, a block is lost, or keys and blocks do not match.
        """
        own = {block: count for block, count in enumerate(self._ref_counts) if count}
        if own != ref_counts:
            raise EngineFault(f"The blocks' reference counts are {ref_counts}; the pool has {own}.")
        if sorted([*self._free, *self._evictable, *own]) != list(range(self.count)):
            raise EngineFault(f"Of {self.count} blocks, {len(own)} are held and {self.available} available.")
        if (
            self._key_by_block != {block: key for key, block in self._block_by_key.items()}
            or not self._key_by_block.keys() >= self._evictable.keys()
        ):
            raise EngineFault("The prefix cache's keys and blocks don't match.")

    def _evict_oldest(self) -> int:
        block, _ = self._evictable.popitem(last=False)
        del self._block_by_key[self._key_by_block.pop(block)]
        return block
