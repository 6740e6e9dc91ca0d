"""Drives the work of several clients by passes that they share."""

from __future__ import annotations

from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import Any, Generic

from loramill.jobs.train.engine.engine import TrainingEngine
from loramill.jobs.train.engine.parts import Part, T, Work
from loramill.jobs.train.engine.schedule import WaitingPart, choose_parts


@dataclass(slots=True)
class _Client(Generic[T]):
    """A client's work, and what it waits for; `started` once it has had a pass."""

    tenant: str
    work: Work[T]
    waits_for: Part | Future[Any]
    started: bool = False


@dataclass(frozen=True, slots=True)
class Ended(Generic[T]):
    """The result of a client's work, or the error that ended it."""

    name: str
    value: T | None
    error: Exception | None


class Driver(Generic[T]):
    """Runs the work of clients until each has ended, in one thread.

    A pass takes parts of the clients that wait for one, the tenant first that was served the fewest tokens; no client
    waits for another's step to be complete.

    Args:
        pass_tokens: maximum tokens of a pass with several parts. If one runs out of memory, the limit drops to half of
            its tokens.
    """

    def __init__(self, engine: TrainingEngine, pass_tokens: int) -> None:
        self._engine, self._pass_tokens = engine, pass_tokens
        self._clients: dict[str, _Client[T]] = {}
        self._served: dict[str, int] = {}
        self._ended: list[Ended[T]] = []

    def __len__(self) -> int:
        return len(self._clients)

    @property
    def waiting_tokens(self) -> int:
        """Tokens of the parts that wait for a pass."""
        return sum(each.waits_for.tokens for each in self._clients.values() if isinstance(each.waits_for, Part))

    @property
    def has_room(self) -> bool:
        """Whether the parts of the clients leave room in a pass; unknown, and False, while a client prepares its first.

        More clients than fill a pass would gain nothing, and each would take longer.
        """
        preparing = any(isinstance(each.waits_for, Future) and not each.started for each in self._clients.values())
        return not preparing and self.waiting_tokens < self._pass_tokens

    def start(self, name: str, tenant: str, work: Work[T]) -> None:
        """Starts a client's work, up to the first pass that it needs."""
        # Only tenants that are active together are compared: one that joins starts level with the least served.
        if not self._clients:
            self._served.clear()
        active = [self._served[client.tenant] for client in self._clients.values()]
        if active and not any(client.tenant == tenant for client in self._clients.values()):
            self._served[tenant] = max(self._served.get(tenant, 0), min(active))
        self._served.setdefault(tenant, 0)
        self._advance(name, tenant, work, None, started=False)

    def run_pass(self, timeout_seconds: float) -> list[Ended[T]]:
        """Runs one pass; returns the outcomes of the work that ended since the last call.

        Args:
            timeout_seconds: how long to wait if no client is ready for a pass.
        """
        self._collect_futures(timeout_seconds)
        waiting = [name for name, client in self._clients.items() if isinstance(client.waits_for, Part)]
        if waiting:
            self._run(waiting)
        ended, self._ended = self._ended, []
        return ended

    def close(self) -> None:
        """Closes the work of all clients."""
        for client in self._clients.values():
            client.work.close()
        self._clients.clear()

    def _run(self, waiting: list[str]) -> None:
        described = [_described(self._clients[name].tenant, self._part(name), self._engine) for name in waiting]
        names = [waiting[index] for index in choose_parts(described, self._served, self._pass_tokens)]
        parts = [self._part(name) for name in names]
        results = self._engine.run(parts)
        for name, part, result in zip(names, parts, results, strict=True):
            client = self._clients.pop(name)
            self._served[client.tenant] += part.tokens
            self._advance(name, client.tenant, client.work, result, started=True)
        self._pass_tokens = min(self._pass_tokens, self._engine.max_tokens)

    def _collect_futures(self, timeout_seconds: float) -> None:
        futures = {name: each.waits_for for name, each in self._clients.items() if isinstance(each.waits_for, Future)}
        if not futures:
            return
        timeout = timeout_seconds if len(futures) == len(self._clients) else 0
        wait(futures.values(), timeout=timeout, return_when=FIRST_COMPLETED)
        for name, future in futures.items():
            if future.done():
                client = self._clients.pop(name)
                outcome = future.exception() or future.result()
                self._advance(name, client.tenant, client.work, outcome, started=client.started)

    def _part(self, name: str) -> Part:
        part = self._clients[name].waits_for
        assert isinstance(part, Part)
        return part

    def _advance(self, name: str, tenant: str, work: Work[T], result: Any, *, started: bool) -> None:
        """Gives a client what it waited for, or the error; it then waits for something else, or has ended."""
        try:
            waits_for = work.throw(result) if isinstance(result, BaseException) else work.send(result)
        except StopIteration as end:
            self._ended.append(Ended(name, end.value, None))
        except Exception as error:  # noqa: BLE001 - whatever it is, it ended this client's work alone
            self._ended.append(Ended(name, None, error))
        else:
            self._clients[name] = _Client(tenant, work, waits_for, started)


def _described(tenant: str, part: Part, engine: TrainingEngine) -> WaitingPart:
    alone = part.backward is not None or not engine.shares_passes
    return WaitingPart(tenant, part.tokens, part.training, alone)
