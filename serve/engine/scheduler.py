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
_PATIENCE = 64
#: Tokens by which a tenant that comes anew is ahead of the others: its first prompt must not be their equal halfway.
_CREDIT = 512


@dataclass(slots=True, eq=False)
class Sequence:
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
    reuse: bool = True
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    sealed: int = 0
    promised: int = 0
    charged: int = 0
    kept_out: int | None = None


@dataclass(frozen=True, slots=True)
class Share:
    """A sequence's part of a step: `count` tokens from position `start`; `sampled` if they are its last known."""

    id: int
    start: int
    count: int
    sampled: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """One step.

    Attributes:
        shares: what runs.
        admitted: sequences that began to run.
        preempted: sequences that wait again.
    """

    shares: tuple[Share, ...]
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

    came: int
    served: int
    queue: list[Sequence] = field(default_factory=list)
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
        self.reused = 0
        self._block_size = block_size
        self._budget = max_batch_tokens
        self._max_running = min(max_sequences, max_batch_tokens)
        self._rank_budget = rank_budget
        self._rank_of = rank_of
        self._pool = BlockPool(blocks)
        self._running: list[Sequence] = []
        self._tenants: dict[str, _Tenant] = {}
        self._all: dict[int, Sequence] = {}
        # Keys of blocks that a running sequence is about to fill: whoever needs them next waits for them.
        self._promised: Counter[bytes] = Counter()
        self._starving: Sequence | None = None
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
        return len(self._all) - len(self._running)

    @property
    def running(self) -> tuple[Sequence, ...]:
        """Sequences that run, in the order of admission."""
        return tuple(self._running)

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        """All sequences, in the order they came."""
        return tuple(self._all.values())

    def __contains__(self, id_: int) -> bool:
        return id_ in self._all

    def get(self, id_: int) -> Sequence:
        """A sequence's numbers."""
        return self._all[id_]

    def add(self, sequence: Sequence) -> None:
        """Lets a sequence wait, behind its tenant's others."""
        if sequence.tenant not in self._tenants:
            came = min((max(tenant.served, tenant.came) for tenant in self._tenants.values()), default=0)
            self._tenants[sequence.tenant] = _Tenant(came, served=came - _CREDIT)
        queue = self._tenants[sequence.tenant].queue
        queue.insert(bisect_right(queue, -sequence.priority, key=_rank_in_queue), sequence)
        self._all[sequence.id] = sequence

    def remove(self, id_: int) -> None:
        """Forgets a sequence, wherever it is, and takes its blocks back."""
        sequence = self._all.pop(id_)
        tenant = self._tenants[sequence.tenant]
        if sequence is self._starving:
            self._starving = None
        if sequence in self._running:
            self._stop(sequence)
        else:
            tenant.queue.remove(sequence)
        if not tenant.queue and not tenant.running:
            del self._tenants[sequence.tenant]

    def plan(self, ready: Callable[[str | None], bool]) -> Plan:
        """Decides the next step.

        Args:
            ready: whether a sequence of a version may begin to run now; the others wait and hold up nobody.
        """
        self._steps += 1
        if self._starving is not None and not ready(self._starving.version):
            # Its version waits for a slot, and those that it would keep out may have them all.
            self._starving = None
        preempted = self._grow()
        # Who has just lost his blocks would only take them back.
        open_ = not preempted
        if open_:
            preempted = self._displace(ready)
        shares: list[Share] = []
        budget = self._budget
        later: list[Sequence] = []
        fair = self._max_running / max(1, len(self._tenants))
        for sequence in self._running:
            if _decodes(sequence) and self._tenants[sequence.tenant].running <= fair:
                budget = self._share(sequence, budget, shares)
            else:
                later.append(sequence)
        later.sort(key=lambda sequence: (self._turn(sequence), not _decodes(sequence)))
        admitted: list[int] = []
        while budget:
            newcomer = self._newcomer(ready) if open_ and len(self._running) < self._max_running else None
            if newcomer is not None and (not later or self._turn(newcomer) < self._turn(later[0])):
                # Nobody jumps over one that lacks blocks, lest it lack them for ever.
                open_ = self._fits(newcomer)
                if open_:
                    self._admit(newcomer)
                    admitted.append(newcomer.id)
                    budget = self._share(newcomer, budget, shares)
            elif later:
                budget = self._share(later.pop(0), budget, shares)
            else:
                break
        return Plan(tuple(shares), tuple(admitted), tuple(preempted))

    def commit(self, plan: Plan) -> None:
        """Notes that a step was computed."""
        for share in plan.shares:
            sequence = self._all[share.id]
            sequence.computed += share.count
            full = sequence.computed // self._block_size
            for index in range(sequence.sealed, full):
                key = self._keys(sequence, full)[index]
                self._pool.seal(sequence.blocks[index], key)
                if index < sequence.promised:
                    self._promised[key] -= 1
            sequence.sealed = full

    def check_integrity(self) -> None:
        """Compares the books.

        Raises:
            EngineFault: a block is lost or held in vain, or a sequence lacks blocks or is in no queue or in two.
        """
        self._pool.check_integrity(dict(Counter(block for s in self._all.values() for block in s.blocks)))
        queued = [*self._running, *(s for tenant in self._tenants.values() for s in tenant.queue)]
        if len(queued) != len(self._all) or {s.id for s in queued} != set(self._all):
            raise EngineFault(f"{len(self._all)} sequences stand in queues {len(queued)} times.")
        running = Counter(s.tenant for s in self._running)
        if any(tenant.running != running[name] for name, tenant in self._tenants.items()):
            raise EngineFault(f"Tenants run {dict(running)} sequences; their books differ.")
        for s in queued:
            if len(s.blocks) * self._block_size < s.computed or s.computed >= len(s.tokens) + (s in self._running):
                raise EngineFault(f"The books of sequence {s.id} don't add up: {s}.")
        if +self._promised != Counter(key for s in self._running for key in s.keys[s.sealed : s.promised]):
            raise EngineFault("Blocks are promised that nobody is filling.")

    def _grow(self) -> list[int]:
        """Gives every running sequence room for its known tokens; who had to give way for that."""
        preempted: list[int] = []
        for sequence in list(self._running):
            while sequence.id not in preempted and self._blocks_for(sequence) > len(sequence.blocks):
                if self._pool.available:
                    sequence.blocks += self._pool.take(1)
                else:
                    preempted.append(self._preempt(self._least()))
        return preempted

    def _displace(self, ready: Callable[[str | None], bool]) -> list[int]:
        """Makes a place for the next newcomer where others have more than theirs; who had to give way for that."""
        newcomer = self._newcomer(ready)
        if newcomer is None or self._fits(newcomer):
            return []
        preempted: list[int] = []
        while not self._fits(newcomer) and self._may_displace(newcomer, self._least()):
            preempted.append(self._preempt(self._least()))
        return preempted

    def _least(self) -> Sequence:
        """Of the running, the one to give way first: of the lowest priority, of who runs the most, the newest."""
        return max(reversed(self._running), key=lambda s: (-s.priority, self._tenants[s.tenant].running))

    def _may_displace(self, newcomer: Sequence, other: Sequence) -> bool:
        mine, theirs = self._tenants[newcomer.tenant], self._tenants[other.tenant]
        more = other.priority < newcomer.priority or theirs.running > mine.running + 1
        return more and self._turn(newcomer) < self._turn(other)

    def _turn(self, sequence: Sequence) -> tuple[int, int, int]:
        tenant = self._tenants[sequence.tenant]
        return -sequence.priority, tenant.served, tenant.running

    def _newcomer(self, ready: Callable[[str | None], bool]) -> Sequence | None:
        """The waiting sequence whose turn it is among those that may begin, the first of its tenant."""
        if not self.waiting:
            return None
        firsts = (
            next((s for s in tenant.queue if ready(s.version) and self._may_begin(s)), None)
            for tenant in self._tenants.values()
        )
        return min((s for s in firsts if s is not None), key=self._turn, default=None)

    def _may_begin(self, sequence: Sequence) -> bool:
        if sequence.reuse:
            keys = self._prefix(sequence)
            known = len(self._pool.match(keys))
            if known < len(keys) and self._is_coming(keys[known], sequence.priority):
                return False
        if sequence.version is None or self._has_rank_for(sequence.version):
            return True
        if sequence.kept_out is None:
            sequence.kept_out = self._steps
        elif self._starving is None and self._steps - sequence.kept_out > _PATIENCE:
            self._starving = sequence
        return False

    def _is_coming(self, key: bytes, priority: int) -> bool:
        """Whether a running sequence is about to fill a block; a lower priority may be put off for ever."""
        return self._promised[key] > 0 and any(
            key in s.keys[s.sealed : s.promised] for s in self._running if s.priority >= priority
        )

    def _has_rank_for(self, version: str) -> bool:
        if self._rank_budget is None:
            return True
        if self._starving is not None and self._starving.version != version:
            return False
        others = {s.version for s in self._running if s.version is not None}
        if version in others or not others:
            return True
        return sum(map(self._rank_of, others)) + self._rank_of(version) <= self._rank_budget

    def _fits(self, sequence: Sequence) -> bool:
        shared = self._shared(sequence)
        more = self._blocks_for(sequence) - len(shared)
        return len(self._running) < self._max_running and self._pool.needed(shared, more) <= self._pool.available

    def _admit(self, sequence: Sequence) -> None:
        if sequence is self._starving:
            self._starving = None
        sequence.kept_out = None
        tenant = self._tenants[sequence.tenant]
        tenant.queue.remove(sequence)
        tenant.running += 1
        self._running.append(sequence)
        shared = self._shared(sequence)
        self._pool.hold(shared)
        sequence.blocks = shared + self._pool.take(self._blocks_for(sequence) - len(shared))
        sequence.sealed = len(shared)
        sequence.computed = len(shared) * self._block_size
        self.reused += sequence.computed
        sequence.promised = len(sequence.tokens) // self._block_size
        self._promised.update(self._keys(sequence, sequence.promised)[sequence.sealed : sequence.promised])

    def _preempt(self, sequence: Sequence) -> int:
        self._stop(sequence)
        queue = self._tenants[sequence.tenant].queue
        queue.insert(bisect_left(queue, -sequence.priority, key=_rank_in_queue), sequence)
        return sequence.id

    def _stop(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._tenants[sequence.tenant].running -= 1
        self._promised.subtract(sequence.keys[sequence.sealed : sequence.promised])
        self._promised = +self._promised
        self._pool.release(sequence.blocks)
        sequence.blocks = []
        sequence.computed = sequence.sealed = sequence.promised = 0

    def _share(self, sequence: Sequence, budget: int, shares: list[Share]) -> int:
        left = len(sequence.tokens) - sequence.computed
        count = min(left, budget)
        if count:
            shares.append(Share(sequence.id, sequence.computed, count, count == left))
            # What is computed anew is not its tenant's fault.
            end = sequence.computed + count
            self._tenants[sequence.tenant].served += max(0, end - sequence.charged)
            sequence.charged = max(sequence.charged, end)
        return budget - count

    def _blocks_for(self, sequence: Sequence) -> int:
        return -(-len(sequence.tokens) // self._block_size)

    def _shared(self, sequence: Sequence) -> list[int]:
        return self._pool.match(self._prefix(sequence)) if sequence.reuse else []

    def _prefix(self, sequence: Sequence) -> list[bytes]:
        """Keys of the blocks that it could begin with; at least one token is left to be computed."""
        return self._keys(sequence, len(sequence.tokens) // self._block_size)[
            : (len(sequence.tokens) - 1) // self._block_size
        ]

    def _keys(self, sequence: Sequence, count: int) -> list[bytes]:
        for start in range(len(sequence.keys) * self._block_size, count * self._block_size, self._block_size):
            before = sequence.keys[-1] if sequence.keys else root_key(sequence.version)
            sequence.keys.append(block_key(before, sequence.tokens[start : start + self._block_size]))
        return sequence.keys


def _decodes(sequence: Sequence) -> bool:
    return len(sequence.tokens) - sequence.computed == 1


def _rank_in_queue(sequence: Sequence) -> int:
    return -sequence.priority
