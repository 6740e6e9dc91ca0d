"""What runs in the next step: pure Python over numbers.

Decode comes first, a token a sequence; what is left of the budget goes to prompts already begun, then to newcomers.
A newcomer gets the blocks of all its known tokens at once, so only decoding can run short. Then the sequence admitted
last gives its blocks back and is computed anew later; the one admitted first always gets on.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from loramill.errors import EngineFault


@dataclass(slots=True, eq=False)
class Sequence:
    """The numbers of one request.

    Attributes:
        known: tokens of the prompt and the answer so far.
        computed: of them, those whose keys and values are in the blocks.
        blocks: what it holds of the KV cache, in order.
    """

    id: str
    tenant: str
    version: str | None
    known: int
    computed: int = 0
    blocks: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Share:
    """A sequence's part of a step: `count` tokens from position `start`; `sampled` if they are its last known."""

    id: str
    start: int
    count: int
    sampled: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """One step.

    Attributes:
        shares: what runs.
        admitted: requests that began to run.
        preempted: requests that wait again.
    """

    shares: tuple[Share, ...]
    admitted: tuple[str, ...]
    preempted: tuple[str, ...]


class Scheduler:
    """The waiting, the running, and the free blocks."""

    def __init__(self, blocks: int, block_size: int, max_batch_tokens: int, max_sequences: int) -> None:
        self.blocks = blocks
        self._block_size = block_size
        self._budget = max_batch_tokens
        self._max_running = min(max_sequences, max_batch_tokens)
        self._free = list(reversed(range(blocks)))
        self._running: list[Sequence] = []
        self._returning: deque[Sequence] = deque()
        self._tenants: OrderedDict[str, deque[Sequence]] = OrderedDict()
        self._all: dict[str, Sequence] = {}

    @property
    def waiting(self) -> int:
        """Requests that don't run."""
        return len(self._all) - len(self._running)

    @property
    def running(self) -> tuple[Sequence, ...]:
        """Requests that run, in the order of admission."""
        return tuple(self._running)

    @property
    def free_blocks(self) -> int:
        """Blocks without an owner."""
        return len(self._free)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that so many tokens take."""
        return -(-tokens // self._block_size)

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        """All requests, in the order they came."""
        return tuple(self._all.values())

    def __contains__(self, request: str) -> bool:
        return request in self._all

    def get(self, request: str) -> Sequence:
        """A request's numbers."""
        return self._all[request]

    def add(self, sequence: Sequence) -> None:
        """Lets a request wait, behind its tenant's others."""
        self._all[sequence.id] = sequence
        self._tenants.setdefault(sequence.tenant, deque()).append(sequence)

    def remove(self, request: str) -> None:
        """Forgets a request, wherever it is, and takes its blocks back."""
        sequence = self._all.pop(request)
        self._release(sequence)
        if sequence in self._running:
            self._running.remove(sequence)
        elif sequence in self._returning:
            self._returning.remove(sequence)
        else:
            self._leave_queue(sequence)

    def plan(self, ready: Callable[[str | None], bool]) -> Plan:
        """Decides the next step.

        Args:
            ready: whether a request of a version may begin to run now; the others wait and hold up nobody.
        """
        preempted = self._make_room_for_decode()
        shares: list[Share] = []
        budget = self._budget
        # In the order of admission decode does come first: newcomers are admitted only when every prompt is through,
        # so that the last alone may have one that isn't.
        for sequence in self._running:
            budget = self._share(sequence, budget, shares)
        admitted: list[str] = []
        while budget and not preempted and len(self._running) < self._max_running:
            newcomer = next(self._candidates(ready), None)
            if newcomer is None or self.blocks_for(newcomer.known) > len(self._free):
                break
            self._admit(newcomer)
            admitted.append(newcomer.id)
            budget = self._share(newcomer, budget, shares)
        return Plan(tuple(shares), tuple(admitted), tuple(preempted))

    def commit(self, plan: Plan) -> None:
        """Notes that a step was computed."""
        for share in plan.shares:
            self._all[share.id].computed += share.count

    def extend(self, request: str) -> None:
        """Notes that a request has one more token."""
        self._all[request].known += 1

    def check_integrity(self) -> None:
        """Compares the books.

        Raises:
            EngineFault: a block is lost or owned twice, or a sequence lacks blocks or is in no queue or in two.
        """
        owned = [block for sequence in self._all.values() for block in sequence.blocks]
        if sorted(owned + self._free) != list(range(self.blocks)):
            raise EngineFault(f"Of {self.blocks} blocks {len(owned)} are owned and {len(self._free)} free.")
        queued = [*self._running, *self._returning, *(s for queue in self._tenants.values() for s in queue)]
        if len(queued) != len(self._all) or {s.id for s in queued} != set(self._all):
            raise EngineFault(f"{len(self._all)} requests stand in queues {len(queued)} times.")
        for sequence in queued:
            if len(sequence.blocks) < self.blocks_for(sequence.computed) or sequence.computed > sequence.known:
                raise EngineFault(f"The books of request {sequence.id} don't add up: {sequence}.")

    def _make_room_for_decode(self) -> list[str]:
        preempted: list[str] = []
        for sequence in list(self._running):
            while sequence in self._running and self.blocks_for(sequence.known) > len(sequence.blocks):
                if self._free:
                    self._take(sequence, 1)
                else:
                    preempted.append(self._preempt_last())
        return preempted

    def _preempt_last(self) -> str:
        victim = self._running.pop()
        self._release(victim)
        victim.computed = 0
        self._returning.appendleft(victim)
        return victim.id

    def _share(self, sequence: Sequence, budget: int, shares: list[Share]) -> int:
        count = min(sequence.known - sequence.computed, budget)
        if count:
            sampled = sequence.computed + count == sequence.known
            shares.append(Share(sequence.id, sequence.computed, count, sampled))
        return budget - count

    def _candidates(self, ready: Callable[[str | None], bool]) -> Iterator[Sequence]:
        # The preempted have waited their turn before; then each tenant's first that can run, tenants in rotation.
        for queue in (self._returning, *self._tenants.values()):
            for sequence in queue:
                if ready(sequence.version):
                    yield sequence
                    break

    def _admit(self, sequence: Sequence) -> None:
        if sequence in self._returning:
            self._returning.remove(sequence)
        else:
            self._leave_queue(sequence)
            if sequence.tenant in self._tenants:
                self._tenants.move_to_end(sequence.tenant)
        self._take(sequence, self.blocks_for(sequence.known))
        self._running.append(sequence)

    def _leave_queue(self, sequence: Sequence) -> None:
        queue = self._tenants[sequence.tenant]
        queue.remove(sequence)
        if not queue:
            del self._tenants[sequence.tenant]

    def _take(self, sequence: Sequence, count: int) -> None:
        sequence.blocks += [self._free.pop() for _ in range(count)]

    def _release(self, sequence: Sequence) -> None:
        self._free += reversed(sequence.blocks)
        sequence.blocks.clear()
