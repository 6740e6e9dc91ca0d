"""Drives the work of several clients by passes that they share."""

from __future__ import annotations

from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from typing import Any, Generic

from loramill.jobs.train.engine.engine import TrainingEngine
from loramill.jobs.train.engine.parts import Part, T, Together, Work
from loramill.jobs.train.engine.schedule import WaitingPart, choose_parts, level_served


@dataclass(slots=True)
class _Client:
    """A client's work, or one of the works that a client does together.

    Attributes:
        waits_for: what it needs next; None for a client that waits for its group.
        started: whether it has had a pass.
        group: the group that the work belongs to, with its index there; None: it is a client's own.
    """

    name: str
    tenant: str
    work: Work[Any]
    waits_for: Part | Future[Any] | None = None
    started: bool = False
    group: tuple[_Group, int] | None = None


@dataclass(slots=True)
class _Group:
    """Works that a client does together, and their results and errors so far, by index."""

    client: _Client
    size: int
    outcomes: dict[int, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Ended(Generic[T]):
    """The result of a client's work, or the error that ended it."""

    name: str
    value: T | None
    error: Exception | None


class Driver(Generic[T]):
    """Runs the work of clients until each has ended, in one thread.

    A pass takes parts of the clients that wait for one, the tenant first that was served the fewest tokens since it
    began to wait for passes; no client waits for another's step to be complete.

    Args:
        pass_tokens: maximum tokens of a pass with several parts. If one runs out of memory, the limit drops to half of
            its tokens.
    """

    def __init__(self, engine: TrainingEngine, pass_tokens: int) -> None:
        self._engine, self._pass_tokens = engine, pass_tokens
        self._waiting: dict[str, _Client] = {}
        self._groups: dict[str, _Group] = {}
        self._served: dict[str, int] = {}
        self._ended: list[Ended[T]] = []

    def __len__(self) -> int:
        clients = (*self._waiting.values(), *(group.client for group in self._groups.values()))
        return sum(client.group is None for client in clients)

    @property
    def waiting_tokens(self) -> int:
        """Tokens of the parts that wait for a pass."""
        return sum(each.waits_for.tokens for each in self._waiting.values() if isinstance(each.waits_for, Part))

    @property
    def has_room(self) -> bool:
        """Whether the parts of the clients leave room in a pass; unknown, and False, while a client prepares its first.

        More clients than fill a pass would gain nothing, and each would take longer.
        """
        preparing = any(isinstance(each.waits_for, Future) and not each.started for each in self._waiting.values())
        return not preparing and self.waiting_tokens < self._pass_tokens

    def start(self, name: str, tenant: str, work: Work[T]) -> None:
        """Starts a client's work, up to the first pass that it needs."""
        self._advance(_Client(name, tenant, work), None)

    def run_pass(self, timeout_seconds: float) -> list[Ended[T]]:
        """Runs one pass; returns the outcomes of the work that ended since the last call.

        Args:
            timeout_seconds: how long to wait if no client is ready for a pass.
        """
        self._collect_futures(timeout_seconds)
        self._stop_clients()
        waiting = [name for name, client in self._waiting.items() if isinstance(client.waits_for, Part)]
        if waiting:
            self._run(waiting)
        ended, self._ended = self._ended, []
        return ended

    def close(self) -> None:
        """Closes the work of all clients."""
        for client in self._waiting.values():
            client.work.close()
        for group in reversed(self._groups.values()):
            group.client.work.close()
        self._waiting.clear()
        self._groups.clear()

    def _run(self, waiting: list[str]) -> None:
        described = [_waiting_part(self._waiting[name].tenant, self._part(name), self._engine) for name in waiting]
        self._served = level_served(self._served, {part.tenant for part in described})
        names = [waiting[index] for index in choose_parts(described, self._served, self._pass_tokens)]
        parts = [self._part(name) for name in names]
        results = self._engine.run(parts)
        for name, part, result in zip(names, parts, results, strict=True):
            client = self._waiting.pop(name)
            self._served[client.tenant] += part.tokens
            client.started = True
            self._advance(client, result)
        self._pass_tokens = min(self._pass_tokens, self._engine.max_tokens)

    def _collect_futures(self, timeout_seconds: float) -> None:
        futures = {name: each.waits_for for name, each in self._waiting.items() if isinstance(each.waits_for, Future)}
        if not futures:
            return
        timeout = timeout_seconds if len(futures) == len(self._waiting) else 0
        wait(futures.values(), timeout=timeout, return_when=FIRST_COMPLETED)
        for name, future in futures.items():
            if future.done():
                self._advance(self._waiting.pop(name), future.exception() or future.result())

    def _stop_clients(self) -> None:
        """Stops clients whose part waits, since many passes of other clients may come before theirs."""
        for name, client in list(self._waiting.items()):
            if isinstance(client.waits_for, Part):
                try:
                    client.waits_for.raise_if_stopped()
                except Exception as error:  # noqa: BLE001 - whatever it is, this client alone gets it
                    self._advance(self._waiting.pop(name), error)

    def _part(self, name: str) -> Part:
        part = self._waiting[name].waits_for
        assert isinstance(part, Part)
        return part

    def _advance(self, client: _Client, result: Any) -> None:
        """Gives a client what it waited for, or the error; it then waits for something else, or has ended."""
        work = client.work
        try:
            waits_for = work.throw(result) if isinstance(result, BaseException) else work.send(result)
        except StopIteration as end:
            self._end(client, end.value, None)
        except Exception as error:  # noqa: BLE001 - whatever it is, it ended this client's work alone
            self._end(client, None, error)
        else:
            if isinstance(waits_for, Together):
                self._start_group(client, waits_for)
            else:
                client.waits_for = waits_for
                self._waiting[client.name] = client

    def _start_group(self, client: _Client, together: Together) -> None:
        client.waits_for = None
        group = self._groups[client.name] = _Group(client, len(together.works))
        for index, work in enumerate(together.works):
            self._advance(_Client(f"{client.name} {index}", client.tenant, work, group=(group, index)), None)

    def _end(self, client: _Client, value: Any, error: Exception | None) -> None:
        if client.group is None:
            self._ended.append(Ended(client.name, value, error))
            return
        group, index = client.group
        group.outcomes[index] = error or value
        if len(group.outcomes) == group.size:
            del self._groups[group.client.name]
            self._advance(group.client, [group.outcomes[each] for each in range(group.size)])


def _waiting_part(tenant: str, part: Part, engine: TrainingEngine) -> WaitingPart:
    alone = part.backward is not None or not engine.shares_passes
    return WaitingPart(tenant, part.tokens, part.training, alone)
