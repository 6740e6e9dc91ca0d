"""Drives the work of several clients by passes that they share."""

from __future__ import annotations

from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any, Generic

from loramill.jobs.train.engine.engine import TrainingEngine
from loramill.jobs.train.engine.parts import Part, T, Work
from loramill.jobs.train.engine.schedule import WaitingPart, choose_parts


@dataclass(slots=True)
class _Client(Generic[T]):
    """A client's work, and what it waits for."""

    tenant: str
    work: Work[T]
    waits_for: Part | Future[Any]


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
        pass_tokens: maximum tokens of a pass with several parts. It is halved if memory runs out in such a pass.
    """

    def __init__(self, engine: TrainingEngine, pass_tokens: int) -> None:
        self._engine, self._pass_tokens = engine, pass_tokens
        self._clients: dict[str, _Client[T]] = {}
        self._served: dict[str, int] = {}
        self._ended: list[Ended[T]] = []

    def __len__(self) -> int:
        return len(self._clients)

    def start(self, name: str, tenant: str, work: Work[T]) -> None:
        """Starts a client's work, up to the first pass that it needs."""
        # A tenant that joins has no claim to what the others were served before.
        active = [self._served[client.tenant] for client in self._clients.values()]
        if active and not any(client.tenant == tenant for client in self._clients.values()):
            self._served[tenant] = max(self._served.get(tenant, 0), min(active))
        self._served.setdefault(tenant, 0)
        self._advance(name, tenant, work, None)

    def run_pass(self, timeout_seconds: float) -> list[Ended[T]]:
        """Runs one pass; returns the clients whose work ended meanwhile.

        Args:
            timeout_seconds: for which to wait if all clients wait for something else than a pass.
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
            self._advance(name, client.tenant, client.work, result)
        self._pass_tokens = min(self._pass_tokens, self._engine.max_tokens)

    def _collect_futures(self, timeout_seconds: float) -> None:
        futures = {name: each.waits_for for name, each in self._clients.items() if isinstance(each.waits_for, Future)}
        if not futures:
            return
        wait(futures.values(), timeout=timeout_seconds if len(futures) == len(self._clients) else 0)
        for name, future in futures.items():
            if future.done():
                client = self._clients.pop(name)
                self._advance(name, client.tenant, client.work, future.exception() or future.result())

    def _part(self, name: str) -> Part:
        part = self._clients[name].waits_for
        assert isinstance(part, Part)
        return part

    def _advance(self, name: str, tenant: str, work: Work[T], result: Any) -> None:
        """Gives a client what it waited for, or the error; it then waits for something else, or has ended."""
        try:
            waits_for = work.throw(result) if isinstance(result, BaseException) else work.send(result)
        except StopIteration as end:
            self._ended.append(Ended(name, end.value, None))
        except Exception as error:  # noqa: BLE001 - whatever it is, it ended this client's work alone
            self._ended.append(Ended(name, None, error))
        else:
            self._clients[name] = _Client(tenant, work, waits_for)


def _described(tenant: str, part: Part, engine: TrainingEngine) -> WaitingPart:
    alone = part.backward is not None or not engine.shares_passes
    return WaitingPart(tenant, part.tokens, part.training, alone)
