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


def block_key(before: bytes, tokens: Sequence[int]) -> bytes:
    """The key of a full block by the key of the one before it (the first: `root_key`) and its tokens."""
    return hashlib.sha256(before + array("q", tokens).tobytes()).digest()


class BlockPool:
    """Numbered blocks, each free or held by one or more sequences."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(reversed(range(count)))
        self._holders = [0] * count
        # In the order in which they were given back.
        self._kept: OrderedDict[int, None] = OrderedDict()
        self._by_key: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}

    @property
    def available(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free) + len(self._kept)

    def match(self, keys: Iterable[bytes]) -> list[int]:
        """The blocks of the longest known prefix of a chain of keys."""
        found = []
        for key in keys:
            block = self._by_key.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def needed(self, blocks: Sequence[int], more: int) -> int:
        """Of the available blocks, how many it takes to hold these and `more`."""
        return more + sum(not self._holders[block] for block in blocks)

    def hold(self, blocks: Sequence[int]) -> None:
        """One more sequence holds these."""
        for block in blocks:
            if not self._holders[block]:
                del self._kept[block]
            self._holders[block] += 1

    def take(self, count: int) -> list[int]:
        """So many blocks for one sequence to write; the caller knows that they are available."""
        taken = [self._free.pop() if self._free else self._forget_oldest() for _ in range(count)]
        for block in taken:
            self._holders[block] = 1
        return taken

    def release(self, blocks: Sequence[int]) -> None:
        """One sequence less holds these, in its order; the end of a prefix is of use to fewer than its beginning."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if not self._holders[block]:
                if block in self._keys:
                    self._kept[block] = None
                else:
                    self._free.append(block)

    def seal(self, block: int, key: bytes) -> None:
        """A block is full, under a key; where another already has that key, that one stays the one to share."""
        if key not in self._by_key:
            self._by_key[key] = block
            self._keys[block] = key

    def check_integrity(self, held: dict[int, int]) -> None:
        """Compares the books with how many sequences hold each block.

        Raises:
            EngineFault: they differ, a block is lost, or a key leads to a block that doesn't know it.
        """
        mine = {block: count for block, count in enumerate(self._holders) if count}
        if mine != held:
            raise EngineFault(f"Blocks are held {held} times; the pool has {mine}.")
        if sorted([*self._free, *self._kept, *mine]) != list(range(self.count)):
            raise EngineFault(f"Of {self.count} blocks {len(mine)} are held, {self.available} available.")
        if (
            self._keys != {block: key for key, block in self._by_key.items()}
            or not self._keys.keys() >= self._kept.keys()
        ):
            raise EngineFault("The prefix cache's keys and blocks don't belong together.")

    def _forget_oldest(self) -> int:
        block, _ = self._kept.popitem(last=False)
        del self._by_key[self._keys.pop(block)]
        return block
