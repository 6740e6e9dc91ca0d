"""A sequence of tokens and how far it has been computed."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class RunningSequence:
    """One answer to be computed, waiting or running.

    Attributes:
        tokens: The prompt and the answer so far; sampled tokens are appended from outside.
        priority: A higher priority goes first.
        use_prefix_cache: Whether the sequence may start from blocks in the prefix cache.
        computed_tokens: Number of tokens whose keys and values are in the KV cache.
        block_table: Its blocks of the KV cache, in order, as int32: each step copies all of them.
        block_keys: Keys of its full blocks, as far as they have been needed.
        cached_blocks: Number of its blocks that are full and in the prefix cache.
        reserved_blocks: Number of its blocks that were full of known tokens when it was admitted.
        charged_tokens: Number of tokens that its tenant has been charged for.
        rank_blocked_since: The step in which the rank budget first kept it waiting since it last ran.
    """

    id: int
    tenant: str
    version: str | None
    tokens: list[int]
    priority: int = 0
    use_prefix_cache: bool = True
    computed_tokens: int = 0
    block_table: array[int] = field(default_factory=lambda: array("i"))
    block_keys: list[bytes] = field(default_factory=list)
    cached_blocks: int = 0
    reserved_blocks: int = 0
    charged_tokens: int = 0
    rank_blocked_since: int | None = None

    @property
    def is_decoding(self) -> bool:
        """Whether only its last token is left to compute."""
        return len(self.tokens) - self.computed_tokens == 1
