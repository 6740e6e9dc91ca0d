"""What runs in the next step: pure Python over numbers.

Decode comes first, a token a sequence. What is left of the budget goes to prompts, those of the tenant that was served
the fewest tokens first (Sheng et al. 2024, "Fairness in Serving Large Language Models", algorithm 2); a tenant that has
more than its share of the places waits with its decodes, too, until that tenant's prompts are through. A newcomer gets
the blocks of all its known tokens at once, so only decoding can run short; then a sequence gives its blocks back and is
computed anew later, from the prefix cache as far as that goes. A newcomer that finds no place may take one from a
lower priority, or from a tenant that was served more and has at least two places more than its own.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from loramill.errors import EngineFault
from loramill.serve.engine.block_pool import BlockPool, block_key, root_key

#: Steps that a sequence may be kept out by the rank budget before no other version is let in before its own.
_RANK_PATIENCE_STEPS = 64
#: Tokens by which a tenant that comes anew is ahead of the others: its first prompt must not be their equal halfway.
_NEW_TENANT_CREDIT_TOKENS = 512


@dataclass(slots=True, eq=False)
class RunningSequence:
    """One answer to be computed.

    Attributes:
        tokens: of the prompt and the answer so far; whoever chooses tokens appends to them.
        priority: higher goes first.
        reuse: whether it may begin with what the prefix cache holds.
        computed: tokens whose keys and values are in the blocks.
        blocks: what it holds of the KV cache, in order.
        keys: of its full blocks, as far as they were needed.
        sealed: blocks that are full, and known by their keys.
        promised: of its blocks, those that were full of known tokens when it was admitted.
        charged: tokens that its tenant was charged for.
        kept_out: the step in which the rank budget first kept it out since it last ran.
    """

    id: int
    tenant: str
    version: str | None
    tokens: list[int]
    priority: int = 0
    use_prefix_cache: bool = True
    computed_tokens: int = 0
    block_table: list[int] = field(default_factory=list)
    block_keys: list[bytes] = field(default_factory=list)
    cached_blocks: int = 0
    reserved_blocks: int = 0
    charged_tokens: int = 0
    rank_blocked_since: int | None = None


@dataclass(frozen=True, slots=True)
class ScheduledChunk:
    """A sequence's part of a step: `count` tokens from position `start`; `sampled` if they are its last known."""

    id: int
    start: int
    count: int
    sampled: bool


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step.

    Attributes:
        shares: what runs.
        admitted: sequences that began to run.
        preempted: sequences that wait again.
    """

    chunks: tuple[ScheduledChunk, ...]
    admitted: tuple[int, ...]
    preempted: tuple[int, ...]


@dataclass(slots=True)
class _Tenant:
    """Who waits or runs.

    Attributes:
        came: the least that any other had been served when it came: it has no claim on what it didn't use before.
        served: tokens.
        queue: its waiting sequences, in their order.
        running: how many it runs.
    """

    floor: int
    served_tokens: int
    waiting: list[RunningSequence] = field(default_factory=list)
    running: int = 0


class Scheduler:
    """The waiting, the running, and their blocks.

    Attributes:
        reused: tokens that the prefix cache spared, since the start.
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
        self.reused_tokens = 0
        self._block_size = block_size
        self._budget = max_batch_tokens
        self._max_running = min(max_sequences, max_batch_tokens)
        self._rank_budget = rank_budget
        self._rank_of = rank_of
        self._pool = BlockPool(blocks)
        self._running: list[RunningSequence] = []
        self._tenants: dict[str, _Tenant] = {}
        self._sequences: dict[int, RunningSequence] = {}
        # Keys of blocks that a running sequence is about to fill: whoever needs them next waits for them.
        self._reserved: Counter[bytes] = Counter()
        self._rank_starved: RunningSequence | None = None
        self._steps = 0

    @property
    def blocks(self) -> int:
        """Of the KV cache."""
        return self._pool.count

    @property
    def free_blocks(self) -> int:
        """Blocks that no sequence holds."""
        return self._pool.available

    @property
    def waiting(self) -> int:
        """Sequences that don't run."""
        return len(self._sequences) - len(self._running)

    @property
    def running(self) -> tuple[RunningSequence, ...]:
        """Sequences that run, in the order of admission."""
        return tuple(self._running)

    @property
    def sequences(self) -> tuple[RunningSequence, ...]:
        """All sequences, in the order they came."""
        return tuple(self._sequences.values())

    def __contains__(self, id_: int) -> bool:
        return id_ in self._sequences

    def get(self, id_: int) -> RunningSequence:
        """A sequence's numbers."""
        return self._sequences[id_]

    def add(self, sequence: RunningSequence) -> None:
        """Lets a sequence wait, behind its tenant's others."""
        if sequence.tenant not in self._tenants:
            came = min((max(tenant.served_tokens, tenant.floor) for tenant in self._tenants.values()), default=0)
            self._tenants[sequence.tenant] = _Tenant(came, served_tokens=came - _NEW_TENANT_CREDIT_TOKENS)
        queue = self._tenants[sequence.tenant].waiting
        queue.insert(bisect_right(queue, -sequence.priority, key=_rank_in_queue), sequence)
        self._sequences[sequence.id] = sequence

    def remove(self, id_: int) -> None:
        """Forgets a sequence, wherever it is, and takes its blocks back."""
        sequence = self._sequences.pop(id_)
        tenant = self._tenants[sequence.tenant]
        if sequence is self._rank_starved:
            self._rank_starved = None
        if sequence in self._running:
            self._stop(sequence)
        else:
            tenant.waiting.remove(sequence)
        if not tenant.waiting and not tenant.running:
            del self._tenants[sequence.tenant]

    def schedule(self, ready: Callable[[str | None], bool]) -> StepPlan:
        """Decides the next step.

        Args:
            ready: whether a sequence of a version may begin to run now; the others wait and hold up nobody.
        """
        self._steps += 1
        if self._rank_starved is not None and not ready(self._rank_starved.version):
            # Its version waits for a slot, and those that it would keep out may have them all.
            self._rank_starved = None
        preempted = self._allocate_for_decode()
        # Who has just lost his blocks would only take them back.
        open_ = not preempted
        if open_:
            preempted = self._preempt_for_waiting(ready)
        shares: list[ScheduledChunk] = []
        budget = self._budget
        later: list[RunningSequence] = []
        fair = self._max_running / max(1, len(self._tenants))
        for sequence in self._running:
            if _decodes(sequence) and self._tenants[sequence.tenant].running <= fair:
                budget = self._schedule_chunk(sequence, budget, shares)
            else:
                later.append(sequence)
        later.sort(key=lambda sequence: (self._priority_key(sequence), not _decodes(sequence)))
        admitted: list[int] = []
        while budget:
            newcomer = self._next_waiting(ready) if open_ and len(self._running) < self._max_running else None
            if newcomer is not None and (not later or self._priority_key(newcomer) < self._priority_key(later[0])):
                # Nobody jumps over one that lacks blocks, lest it lack them for ever.
                open_ = self._fits(newcomer)
                if open_:
                    self._admit(newcomer)
                    admitted.append(newcomer.id)
                    budget = self._schedule_chunk(newcomer, budget, shares)
            elif later:
                budget = self._schedule_chunk(later.pop(0), budget, shares)
            else:
                break
        return StepPlan(tuple(shares), tuple(admitted), tuple(preempted))

    def commit(self, plan: StepPlan) -> None:
        """Notes that a step was computed."""
        for share in plan.chunks:
            sequence = self._sequences[share.id]
            sequence.computed_tokens += share.count
            full = sequence.computed_tokens // self._block_size
            for index in range(sequence.cached_blocks, full):
                key = self._keys(sequence, full)[index]
                self._pool.cache(sequence.block_table[index], key)
                if index < sequence.reserved_blocks:
                    self._reserved[key] -= 1
            sequence.cached_blocks = full

    def check_integrity(self) -> None:
        """Compares the books.

        Raises:
            EngineFault: a block is lost or held in vain, or a sequence lacks blocks or is in no queue or in two.
        """
        self._pool.check_integrity(dict(Counter(block for s in self._sequences.values() for block in s.block_table)))
        queued = [*self._running, *(s for tenant in self._tenants.values() for s in tenant.waiting)]
        if len(queued) != len(self._sequences) or {s.id for s in queued} != set(self._sequences):
            raise EngineFault(f"{len(self._sequences)} sequences stand in queues {len(queued)} times.")
        running = Counter(s.tenant for s in self._running)
        if any(tenant.running != running[name] for name, tenant in self._tenants.items()):
            raise EngineFault(f"Tenants run {dict(running)} sequences; their books differ.")
        for s in queued:
            if len(s.block_table) * self._block_size < s.computed_tokens or s.computed_tokens >= len(s.tokens) + (
                s in self._running
            ):
                raise EngineFault(f"The books of sequence {s.id} don't add up: {s}.")
        if +self._reserved != Counter(
            key for s in self._running for key in s.block_keys[s.cached_blocks : s.reserved_blocks]
        ):
            raise EngineFault("Blocks are promised that nobody is filling.")

    def _allocate_for_decode(self) -> list[int]:
        """Gives every running sequence room for its known tokens; who had to give way for that."""
        preempted: list[int] = []
        for sequence in list(self._running):
            while sequence.id not in preempted and self._blocks_for(sequence) > len(sequence.block_table):
                if self._pool.available:
                    sequence.block_table += self._pool.allocate(1)
                else:
                    preempted.append(self._preempt(self._preemption_victim()))
        return preempted

    def _preempt_for_waiting(self, ready: Callable[[str | None], bool]) -> list[int]:
        """Makes a place for the next newcomer where others have more than theirs; who had to give way for that."""
        newcomer = self._next_waiting(ready)
        if newcomer is None or self._fits(newcomer):
            return []
        preempted: list[int] = []
        while not self._fits(newcomer) and self._may_preempt(newcomer, self._preemption_victim()):
            preempted.append(self._preempt(self._preemption_victim()))
        return preempted

    def _preemption_victim(self) -> RunningSequence:
        """Of the running, the one to give way first: of the lowest priority, of who runs the most, the newest."""
        return max(reversed(self._running), key=lambda s: (-s.priority, self._tenants[s.tenant].running))

    def _may_preempt(self, newcomer: RunningSequence, other: RunningSequence) -> bool:
        mine, theirs = self._tenants[newcomer.tenant], self._tenants[other.tenant]
        more = other.priority < newcomer.priority or theirs.running > mine.running + 1
        return more and self._priority_key(newcomer) < self._priority_key(other)

    def _priority_key(self, sequence: RunningSequence) -> tuple[int, int, int]:
        tenant = self._tenants[sequence.tenant]
        return -sequence.priority, tenant.served_tokens, tenant.running

    def _next_waiting(self, ready: Callable[[str | None], bool]) -> RunningSequence | None:
        """The waiting sequence whose turn it is among those that may begin, the first of its tenant."""
        if not self.waiting:
            return None
        firsts = (
            next((s for s in tenant.waiting if ready(s.version) and self._may_begin(s)), None)
            for tenant in self._tenants.values()
        )
        return min((s for s in firsts if s is not None), key=self._priority_key, default=None)

    def _may_begin(self, sequence: RunningSequence) -> bool:
        if sequence.use_prefix_cache:
            keys = self._prefix(sequence)
            known = len(self._pool.match(keys))
            if known < len(keys) and self._is_reserved(keys[known], sequence.priority):
                return False
        if sequence.version is None or self._has_rank_for(sequence.version):
            return True
        if sequence.rank_blocked_since is None:
            sequence.rank_blocked_since = self._steps
        elif self._rank_starved is None and self._steps - sequence.rank_blocked_since > _RANK_PATIENCE_STEPS:
            self._rank_starved = sequence
        return False

    def _is_reserved(self, key: bytes, priority: int) -> bool:
        """Whether a running sequence is about to fill a block; a lower priority may be put off for ever."""
        return self._reserved[key] > 0 and any(
            key in s.block_keys[s.cached_blocks : s.reserved_blocks] for s in self._running if s.priority >= priority
        )

    def _has_rank_for(self, version: str) -> bool:
        if self._rank_budget is None:
            return True
        if self._rank_starved is not None and self._rank_starved.version != version:
            return False
        others = {s.version for s in self._running if s.version is not None}
        if version in others or not others:
            return True
        return sum(map(self._rank_of, others)) + self._rank_of(version) <= self._rank_budget

    def _fits(self, sequence: RunningSequence) -> bool:
        shared = self._shared(sequence)
        more = self._blocks_for(sequence) - len(shared)
        return len(self._running) < self._max_running and self._pool.needed(shared, more) <= self._pool.available

    def _admit(self, sequence: RunningSequence) -> None:
        if sequence is self._rank_starved:
            self._rank_starved = None
        sequence.rank_blocked_since = None
        tenant = self._tenants[sequence.tenant]
        tenant.waiting.remove(sequence)
        tenant.running += 1
        self._running.append(sequence)
        shared = self._shared(sequence)
        self._pool.incref(shared)
        sequence.block_table = shared + self._pool.allocate(self._blocks_for(sequence) - len(shared))
        sequence.cached_blocks = len(shared)
        sequence.computed_tokens = len(shared) * self._block_size
        self.reused_tokens += sequence.computed_tokens
        sequence.reserved_blocks = len(sequence.tokens) // self._block_size
        self._reserved.update(
            self._keys(sequence, sequence.reserved_blocks)[sequence.cached_blocks : sequence.reserved_blocks]
        )

    def _preempt(self, sequence: RunningSequence) -> int:
        self._stop(sequence)
        queue = self._tenants[sequence.tenant].waiting
        queue.insert(bisect_left(queue, -sequence.priority, key=_rank_in_queue), sequence)
        return sequence.id

    def _stop(self, sequence: RunningSequence) -> None:
        self._running.remove(sequence)
        self._tenants[sequence.tenant].running -= 1
        self._reserved.subtract(sequence.block_keys[sequence.cached_blocks : sequence.reserved_blocks])
        self._reserved = +self._reserved
        self._pool.free(sequence.block_table)
        sequence.block_table = []
        sequence.computed_tokens = sequence.cached_blocks = sequence.reserved_blocks = 0

    def _schedule_chunk(self, sequence: RunningSequence, budget: int, shares: list[ScheduledChunk]) -> int:
        left = len(sequence.tokens) - sequence.computed_tokens
        count = min(left, budget)
        if count:
            shares.append(ScheduledChunk(sequence.id, sequence.computed_tokens, count, count == left))
            # What is computed anew is not its tenant's fault.
            end = sequence.computed_tokens + count
            self._tenants[sequence.tenant].served_tokens += max(0, end - sequence.charged_tokens)
            sequence.charged_tokens = max(sequence.charged_tokens, end)
        return budget - count

    def _blocks_for(self, sequence: RunningSequence) -> int:
        return -(-len(sequence.tokens) // self._block_size)

    def _shared(self, sequence: RunningSequence) -> list[int]:
        return self._pool.match(self._prefix(sequence)) if sequence.use_prefix_cache else []

    def _prefix(self, sequence: RunningSequence) -> list[bytes]:
        """Keys of the blocks that it could begin with; at least one token is left to be computed."""
        return self._keys(sequence, len(sequence.tokens) // self._block_size)[
            : (len(sequence.tokens) - 1) // self._block_size
        ]

    def _keys(self, sequence: RunningSequence, count: int) -> list[bytes]:
        for start in range(len(sequence.block_keys) * self._block_size, count * self._block_size, self._block_size):
            before = sequence.block_keys[-1] if sequence.block_keys else root_key(sequence.version)
            sequence.block_keys.append(block_key(before, sequence.tokens[start : start + self._block_size]))
        return sequence.block_keys


def _decodes(sequence: RunningSequence) -> bool:
    return len(sequence.tokens) - sequence.computed_tokens == 1


def _rank_in_queue(sequence: RunningSequence) -> int:
    return -sequence.priority
