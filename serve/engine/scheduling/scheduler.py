"""Decides what runs in each step: pure Python over numbers.

Decodes come first, one token per sequence. The rest of the token budget goes to prompts, those of the tenant that has
been served the fewest tokens first. A tenant that runs more than its share of the sequences also waits with its decodes
until those prompts are through. A sequence that starts gets the blocks for all of its known tokens at once, so only
decoding can run out of blocks; then one sequence gives its blocks back and is computed again later, from the prefix
cache as far as possible. A waiting sequence that finds no room may preempt one of lower priority, or of a tenant that
has been served more and runs at least two sequences more than its own.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from loramill.errors import EngineFault
from loramill.serve.engine.scheduling.block_pool import BlockPool, block_key, root_key
from loramill.serve.engine.scheduling.fair_queue import FairQueue
from loramill.serve.engine.scheduling.rank_budget import RankBudget
from loramill.serve.engine.scheduling.sequence import RunningSequence


class ScheduledChunk(NamedTuple):
    """What one sequence computes in a step. A tuple, since a step makes one per sequence.

    Attributes:
        id: Of the sequence.
        start: Position of the first token.
        count: Number of tokens.
        sampled: Whether these are the sequence's last known tokens, so that its next token is sampled.
    """

    id: int
    start: int
    count: int  # type: ignore[assignment]  # a tuple's method
    sampled: bool


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What the scheduler decided for one step.

    Attributes:
        chunks: What runs.
        admitted: Ids of the sequences that start.
        preempted: Ids of the sequences that wait again.
    """

    chunks: tuple[ScheduledChunk, ...]
    admitted: tuple[int, ...]
    preempted: tuple[int, ...]


class Scheduler:
    """The waiting and running sequences, and their blocks of the KV cache.

    Attributes:
        reused_tokens: Number of tokens taken from the prefix cache since the start.
    """

    def __init__(
        self,
        blocks: int,
        block_size: int,
        max_batch_tokens: int,
        max_sequences: int,
        *,
        rank_budget: int | None = None,
        rank_of: Callable[[str], int] = lambda version: 0,
    ) -> None:
        """
        Args:
            blocks: Number of blocks of the KV cache.
            block_size: Tokens per block.
            max_batch_tokens: Token budget of a step.
            max_sequences: Number of sequences that run at once.
            rank_budget: Largest sum of the ranks of a step's different adapters; None: no limit.
            rank_of: The rank of a version that is ready.
        """
        self.reused_tokens = 0
        self._block_size = block_size
        self._token_budget = max_batch_tokens
        self._max_running = min(max_sequences, max_batch_tokens)
        self._pool = BlockPool(blocks)
        self._queue = FairQueue()
        self._ranks = RankBudget(rank_budget, rank_of)
        self._running: list[RunningSequence] = []
        self._sequences: dict[int, RunningSequence] = {}
        # Keys of blocks that a running sequence will fill soon: another that needs one waits until it can share it.
        self._reserved: Counter[bytes] = Counter()

    @property
    def blocks(self) -> int:
        """Number of blocks of the KV cache."""
        return self._pool.count

    @property
    def free_blocks(self) -> int:
        """Number of blocks that no sequence holds."""
        return self._pool.available

    @property
    def waiting(self) -> int:
        """Number of sequences that do not run."""
        return len(self._sequences) - len(self._running)

    @property
    def running(self) -> tuple[RunningSequence, ...]:
        """Sequences that run, in the order of admission."""
        return tuple(self._running)

    @property
    def sequences(self) -> tuple[RunningSequence, ...]:
        """All sequences, in the order of their arrival."""
        return tuple(self._sequences.values())

    def __contains__(self, id_: object) -> bool:
        return id_ in self._sequences

    def get(self, id_: int) -> RunningSequence:
        """The sequence with an id."""
        return self._sequences[id_]

    @property
    def has_running(self) -> bool:
        """Whether any sequence runs."""
        return bool(self._running)

    def is_running(self, sequence: RunningSequence) -> bool:
        """Whether a sequence runs."""
        return sequence in self._running

    def add(self, sequence: RunningSequence) -> None:
        """Adds a waiting sequence, behind its tenant's others."""
        self._queue.add(sequence)
        self._sequences[sequence.id] = sequence

    def remove(self, id_: int) -> None:
        """Removes a sequence, whether it waits or runs, and frees its blocks."""
        sequence = self._sequences.pop(id_)
        self._ranks.forget(sequence)
        running = sequence in self._running
        if running:
            self._free(sequence)
        self._queue.remove(sequence, running=running)

    def schedule(self, ready: Callable[[str | None], bool]) -> StepPlan:
        """Decides the next step.

        Args:
            ready: Whether a sequence of a version may start now; those of other versions wait without delaying others.
        """
        self._ranks.begin_step(ready)
        preempted = self._allocate_for_decode()
        # A sequence that has just lost its blocks would only take them back.
        may_admit = not preempted
        if may_admit:
            preempted = self._preempt_for_waiting(ready)
        chunks, admitted = self._fill_token_budget(ready, may_admit)
        return StepPlan(tuple(chunks), tuple(admitted), tuple(preempted))

    def allocate_ahead(self, sequences: Sequence[RunningSequence]) -> bool:
        """Gives each of these running sequences the block for one more token than it has, if blocks are available.

        Returns:
            Whether they have them; if not, nothing has changed.
        """
        size = self._block_size
        lacking = [s for s in sequences if len(s.tokens) >= len(s.block_table) * size]
        if len(lacking) > self._pool.available:
            return False
        for sequence in lacking:
            sequence.block_table.extend(self._pool.allocate(1))
        return True

    def commit(self, plan: StepPlan) -> None:
        """Records that a step was computed."""
        for chunk in plan.chunks:
            sequence = self._sequences[chunk.id]
            sequence.computed_tokens += chunk.count
            full = sequence.computed_tokens // self._block_size
            if full == sequence.cached_blocks:
                continue
            for index in range(sequence.cached_blocks, full):
                key = self._block_keys(sequence, full)[index]
                self._pool.cache(sequence.block_table[index], key)
                if index < sequence.reserved_blocks:
                    self._reserved[key] -= 1
            sequence.cached_blocks = full

    def check_integrity(self) -> None:
        """Checks blocks, queues and counters against each other.

        Raises:
            EngineFault: A block is lost or held without need, or a sequence lacks blocks or is in no queue or in two.
        """
        self._pool.check_integrity(dict(Counter(block for s in self._sequences.values() for block in s.block_table)))
        queued = [*self._running, *self._queue.check_integrity(self._running)]
        if len(queued) != len(self._sequences) or {s.id for s in queued} != set(self._sequences):
            raise EngineFault(f"{len(self._sequences)} sequences have {len(queued)} queue entries.")
        for s in queued:
            known = len(s.tokens) + (s in self._running)
            if len(s.block_table) * self._block_size < s.computed_tokens or s.computed_tokens >= known:
                raise EngineFault(f"The counters of sequence {s.id} are inconsistent: {s}.")
        if +self._reserved != Counter(key for s in self._running for key in s.block_keys[_reserved(s)]):
            raise EngineFault("There are reserved blocks that no sequence is filling.")

    def _allocate_for_decode(self) -> list[int]:
        """Gives each running sequence the blocks for its known tokens; returns the ids preempted for that."""
        preempted: list[int] = []
        size = self._block_size
        for sequence in [s for s in self._running if len(s.tokens) > len(s.block_table) * size]:
            while sequence.id not in preempted and self._blocks_for(sequence) > len(sequence.block_table):
                if self._pool.available:
                    sequence.block_table.extend(self._pool.allocate(1))
                else:
                    preempted.append(self._preempt(self._preemption_victim()))
        return preempted

    def _preempt_for_waiting(self, ready: Callable[[str | None], bool]) -> list[int]:
        """Makes room for the next waiting sequence where others run more than their share; returns the preempted."""
        waiting = self._next_waiting(ready)
        if waiting is None or self._fits(waiting):
            return []
        preempted: list[int] = []
        while not self._fits(waiting) and self._may_preempt(waiting, self._preemption_victim()):
            preempted.append(self._preempt(self._preemption_victim()))
        return preempted

    def _fill_token_budget(
        self, ready: Callable[[str | None], bool], may_admit: bool
    ) -> tuple[list[ScheduledChunk], list[int]]:
        """Hands out the token budget: decodes within their tenant's share, then prompts and other decodes in turn."""
        chunks: list[ScheduledChunk] = []
        admitted: list[int] = []
        budget = self._token_budget
        later: list[RunningSequence] = []
        above_share = self._queue.tenants_above(self._max_running / max(1, self._queue.tenants))
        for sequence in self._running:
            if sequence.is_decoding and sequence.tenant not in above_share:
                budget -= self._schedule_chunk(sequence, budget, chunks)
            else:
                later.append(sequence)
        priority_key = self._queue.priority_key
        later.sort(key=lambda sequence: (priority_key(sequence), not sequence.is_decoding))
        while budget:
            waiting = self._next_waiting(ready) if may_admit and len(self._running) < self._max_running else None
            if waiting is not None and (not later or priority_key(waiting) < priority_key(later[0])):
                # No sequence overtakes one that lacks blocks, or that one might never get them.
                may_admit = self._fits(waiting)
                if may_admit:
                    self._admit(waiting)
                    admitted.append(waiting.id)
                    budget -= self._schedule_chunk(waiting, budget, chunks)
            elif later:
                budget -= self._schedule_chunk(later.pop(0), budget, chunks)
            else:
                break
        return chunks, admitted

    def _schedule_chunk(self, sequence: RunningSequence, budget: int, chunks: list[ScheduledChunk]) -> int:
        """Schedules as many of a sequence's tokens as the budget allows; returns their number."""
        start = sequence.computed_tokens
        left = len(sequence.tokens) - start
        count = left if left < budget else budget
        if count:
            chunks.append(ScheduledChunk(sequence.id, start, count, count == left))
            self._queue.charge(sequence, start + count)
        return count

    def _next_waiting(self, ready: Callable[[str | None], bool]) -> RunningSequence | None:
        """The waiting sequence to start next, of those that may start."""
        if not self.waiting:
            return None
        return self._queue.next(lambda sequence: ready(sequence.version) and self._may_start(sequence))

    def _may_start(self, sequence: RunningSequence) -> bool:
        if sequence.use_prefix_cache:
            keys = self._prefix_keys(sequence)
            known = len(self._pool.match(keys))
            if known < len(keys) and self._is_reserved(keys[known], sequence.priority):
                return False
        return self._ranks.admits(sequence, self._running)

    def _is_reserved(self, key: bytes, priority: int) -> bool:
        """Whether a running sequence will fill a block soon; one of lower priority may be delayed without end."""
        return self._reserved[key] > 0 and any(
            key in s.block_keys[_reserved(s)] for s in self._running if s.priority >= priority
        )

    def _fits(self, sequence: RunningSequence) -> bool:
        shared = self._shared_blocks(sequence)
        new = self._blocks_for(sequence) - len(shared)
        return len(self._running) < self._max_running and self._pool.needed(shared, new) <= self._pool.available

    def _admit(self, sequence: RunningSequence) -> None:
        self._ranks.forget(sequence)
        self._queue.start(sequence)
        self._running.append(sequence)
        shared = self._shared_blocks(sequence)
        self._pool.incref(shared)
        new = self._pool.allocate(self._blocks_for(sequence) - len(shared))
        sequence.block_table = array("i", [*shared, *new])
        sequence.cached_blocks = len(shared)
        sequence.computed_tokens = len(shared) * self._block_size
        self.reused_tokens += sequence.computed_tokens
        sequence.reserved_blocks = len(sequence.tokens) // self._block_size
        self._reserved.update(self._block_keys(sequence, sequence.reserved_blocks)[_reserved(sequence)])

    def _preemption_victim(self) -> RunningSequence:
        """The running sequence to preempt first: of the lowest priority, of the tenant that runs most, the newest."""
        return max(reversed(self._running), key=lambda s: (-s.priority, self._queue.running(s.tenant)))

    def _may_preempt(self, waiting: RunningSequence, victim: RunningSequence) -> bool:
        running, victim_running = self._queue.running(waiting.tenant), self._queue.running(victim.tenant)
        entitled = victim.priority < waiting.priority or victim_running > running + 1
        return entitled and self._queue.priority_key(waiting) < self._queue.priority_key(victim)

    def _preempt(self, sequence: RunningSequence) -> int:
        self._free(sequence)
        self._queue.preempt(sequence)
        return sequence.id

    def _free(self, sequence: RunningSequence) -> None:
        """Takes a sequence off the running ones and frees its blocks."""
        self._running.remove(sequence)
        self._reserved.subtract(sequence.block_keys[_reserved(sequence)])
        self._reserved = +self._reserved
        self._pool.free(sequence.block_table)
        sequence.block_table = array("i")
        sequence.computed_tokens = sequence.cached_blocks = sequence.reserved_blocks = 0

    def _blocks_for(self, sequence: RunningSequence) -> int:
        return -(-len(sequence.tokens) // self._block_size)

    def _shared_blocks(self, sequence: RunningSequence) -> list[int]:
        return self._pool.match(self._prefix_keys(sequence)) if sequence.use_prefix_cache else []

    def _prefix_keys(self, sequence: RunningSequence) -> list[bytes]:
        """Keys of the blocks that a sequence could start from; at least one token is left to compute."""
        keys = self._block_keys(sequence, len(sequence.tokens) // self._block_size)
        return keys[: (len(sequence.tokens) - 1) // self._block_size]

    def _block_keys(self, sequence: RunningSequence, count: int) -> list[bytes]:
        keys, size = sequence.block_keys, self._block_size
        for start in range(len(keys) * size, count * size, size):
            parent = keys[-1] if keys else root_key(sequence.version)
            keys.append(block_key(parent, sequence.tokens[start : start + size]))
        return keys


def _reserved(sequence: RunningSequence) -> slice:
    """Which of its blocks a sequence has yet to fill with tokens that were known when it was admitted."""
    return slice(sequence.cached_blocks, sequence.reserved_blocks)
