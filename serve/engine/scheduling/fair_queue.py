"""Waiting sequences by tenant, ordered by a virtual token counter."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from loramill.errors import EngineFault
from loramill.serve.engine.scheduling.sequence import RunningSequence

#: Tokens by which a new tenant is ahead of the others, so that it does not fall level with them halfway through its
#: first prompt.
_NEW_TENANT_CREDIT_TOKENS = 512


@dataclass(slots=True)
class _Tenant:
    """A tenant with sequences that wait or run.

    Attributes:
        floor: The fewest tokens that any other tenant had been served when this one arrived; it has no claim to what
            it did not use before.
        served_tokens: Its virtual token counter.
        waiting: Its waiting sequences, first in the list first to run.
        running: Number of its running sequences.
    """

    floor: int
    served_tokens: int
    waiting: list[RunningSequence] = field(default_factory=list)
    running: int = 0


class FairQueue:
    """Orders waiting sequences: by priority, then the tenant that has been served the fewest tokens.

    The counter is that of Sheng et al. 2024, "Fairness in Serving Large Language Models", algorithm 2. A tenant is
    forgotten once it has no sequence.
    """

    def __init__(self) -> None:
        self._tenants: dict[str, _Tenant] = {}

    @property
    def tenants(self) -> int:
        """Number of tenants with sequences that wait or run."""
        return len(self._tenants)

    def running(self, tenant: str) -> int:
        """Number of a tenant's running sequences."""
        return self._tenants[tenant].running

    def tenants_above(self, share: float) -> set[str]:
        """Tenants with more running sequences than this."""
        return {name for name, tenant in self._tenants.items() if tenant.running > share}

    def priority_key(self, sequence: RunningSequence) -> tuple[int, int, int]:
        """Sort key of a sequence of any state: the lowest goes first."""
        tenant = self._tenants[sequence.tenant]
        return -sequence.priority, tenant.served_tokens, tenant.running

    def next(self, may_start: Callable[[RunningSequence], bool]) -> RunningSequence | None:
        """The waiting sequence to start next.

        Args:
            may_start: Whether a sequence may start now; those that may not are passed over.
        """
        firsts = (next(filter(may_start, tenant.waiting), None) for tenant in self._tenants.values())
        return min((s for s in firsts if s is not None), key=self.priority_key, default=None)

    def add(self, sequence: RunningSequence) -> None:
        """Adds a new sequence behind its tenant's others."""
        if sequence.tenant not in self._tenants:
            floor = min((max(t.served_tokens, t.floor) for t in self._tenants.values()), default=0)
            self._tenants[sequence.tenant] = _Tenant(floor, floor - _NEW_TENANT_CREDIT_TOKENS)
        waiting = self._tenants[sequence.tenant].waiting
        waiting.insert(bisect_right(waiting, -sequence.priority, key=_by_priority), sequence)

    def start(self, sequence: RunningSequence) -> None:
        """Moves a waiting sequence to the running ones."""
        tenant = self._tenants[sequence.tenant]
        tenant.waiting.remove(sequence)
        tenant.running += 1

    def preempt(self, sequence: RunningSequence) -> None:
        """Moves a running sequence back, ahead of its tenant's others of its priority."""
        tenant = self._tenants[sequence.tenant]
        tenant.running -= 1
        tenant.waiting.insert(bisect_left(tenant.waiting, -sequence.priority, key=_by_priority), sequence)

    def remove(self, sequence: RunningSequence, *, running: bool) -> None:
        """Removes a sequence that runs or, if not `running`, waits."""
        tenant = self._tenants[sequence.tenant]
        if running:
            tenant.running -= 1
        else:
            tenant.waiting.remove(sequence)
        if not tenant.waiting and not tenant.running:
            del self._tenants[sequence.tenant]

    def charge(self, sequence: RunningSequence, end: int) -> None:
        """Charges the tenant for a sequence's tokens up to position `end`.

        Tokens that are computed again after a preemption are not charged twice.
        """
        if end > sequence.charged_tokens:
            self._tenants[sequence.tenant].served_tokens += end - sequence.charged_tokens
            sequence.charged_tokens = end

    def check_integrity(self, running: Iterable[RunningSequence]) -> list[RunningSequence]:
        """Compares the counts with the sequences that run; returns those that wait.

        Raises:
            EngineFault: A tenant's number of running sequences differs.
        """
        counts = Counter(s.tenant for s in running)
        if any(tenant.running != counts[name] for name, tenant in self._tenants.items()):
            raise EngineFault(f"Tenants run {dict(counts)} sequences; the fair queue counts differently.")
        return [s for tenant in self._tenants.values() for s in tenant.waiting]


def _by_priority(sequence: RunningSequence) -> int:
    return -sequence.priority
