"""The live requests of an engine, their deadlines, and what other threads have submitted or cancelled."""

from __future__ import annotations

import heapq
import threading
import time
from collections import Counter
from collections.abc import Container, Iterable, Sequence

from loramill.errors import Conflict, EngineFault, LoramillError, Overloaded, Unavailable
from loramill.serve.engine.request import RequestState
from loramill.serve.engine.types import Request


class RequestTable:
    """Live requests by the id of each answer's sequence, with an inbox for the engine's next step. Thread-safe."""

    def __init__(self, max_sequences: int, max_waiting: int) -> None:
        """
        Args:
            max_sequences: Number of answers that run at once.
            max_waiting: Number of answers that may wait besides.
        """
        self._capacity = max_sequences + max_waiting
        self._max_waiting = max_waiting
        self._changed = threading.Condition()
        self._work_pending = False
        self._closed = False
        # In the order of the calls: new answers, and ids of requests to cancel.
        self._inbox: list[RequestState | str] = []
        self._states: dict[int, RequestState] = {}
        self._ids: dict[str, set[int]] = {}
        self._deadlines: list[tuple[float, int]] = []

    def __len__(self) -> int:
        return len(self._states)

    def __getitem__(self, id_: int) -> RequestState:
        return self._states[id_]

    @property
    def pending_tokens(self) -> int:
        """Number of tokens still to compute for all answers, partly estimated."""
        with self._changed:
            return sum(state.pending_tokens for state in self._states.values())

    def submit(self, request: Request, states: Sequence[RequestState]) -> None:
        """Adds a request's answers to the table and the inbox.

        Raises:
            Conflict: A request with this id is live.
            Overloaded: Too many answers are waiting.
            Unavailable: The table is closed.
        """
        with self._changed:
            if self._closed:
                raise Unavailable("The engine is closed.")
            if request.id in self._ids:
                raise Conflict(f"A request with the id {request.id} is being served; ids must differ.")
            self._make_room(request.tenant)
            self._ids[request.id] = {state.id for state in states}
            for state in states:
                self._states[state.id] = state
                if request.timeout_seconds is not None:
                    heapq.heappush(self._deadlines, (time.monotonic() + request.timeout_seconds, state.id))
            self._inbox += states
            self._wake()

    def cancel(self, request_id: str) -> None:
        """Puts a cancellation into the inbox."""
        with self._changed:
            self._inbox.append(request_id)
            self._wake()

    def wake(self) -> None:
        """Announces that a step has something to do."""
        with self._changed:
            self._wake()

    @property
    def has_work(self) -> bool:
        """Whether a step may have something to do now."""
        with self._changed:
            return not self._closed and (self._work_pending or self._seconds_left() <= 0)

    def wait(self, timeout: float) -> bool:
        """Blocks until a step may have something to do, at most `timeout` seconds; returns whether it has."""
        with self._changed:
            self._changed.wait_for(lambda: self._work_pending, max(0.0, min(timeout, self._seconds_left())))
            return self.has_work

    def drain_inbox(self) -> list[RequestState | str]:
        """Takes new answers and ids of requests to cancel, in the order of the calls."""
        with self._changed:
            self._work_pending = False
            inbox, self._inbox = self._inbox, []
            return inbox

    def ids_of(self, request_id: str) -> list[int]:
        """Ids of a request's live answers, in order; empty if it is not live."""
        with self._changed:
            return sorted(self._ids.get(request_id, ()))

    def overload_victims(self, scheduled: Container[int]) -> list[int]:
        """Scheduled answers that have to give way to another tenant's; one that has started meanwhile stays."""
        with self._changed:
            return [
                id_
                for id_, state in self._states.items()
                if state.overload_victim and state.waiting_since is not None and id_ in scheduled
            ]

    def take_overdue(self, scheduled: Container[int]) -> list[int]:
        """Takes the deadlines of scheduled answers that have passed; returns the answers' ids."""
        with self._changed:
            overdue = []
            while self._seconds_left() <= 0:
                overdue.append(heapq.heappop(self._deadlines))
            # Answers that are still in the inbox are left to the next step.
            for entry in overdue:
                if entry[1] not in scheduled:
                    heapq.heappush(self._deadlines, entry)
        return [id_ for _, id_ in overdue if id_ in scheduled]

    def remove(self, state: RequestState) -> None:
        """Removes an answer, and its request with the last one."""
        with self._changed:
            self._remove(state)

    def remove_drained(self) -> list[RequestState]:
        """Removes all answers that are no longer in the inbox, and returns them."""
        with self._changed:
            new = self._new_ids()
            removed = [state for id_, state in self._states.items() if id_ not in new]
            for state in removed:
                self._remove(state)
            return removed

    @property
    def closed(self) -> bool:
        """Whether further requests are refused."""
        with self._changed:
            return self._closed

    def close(self) -> bool:
        """Refuses further requests; returns whether it was closed already."""
        with self._changed:
            closed, self._closed = self._closed, True
            return closed

    def check_integrity(self, scheduled: Iterable[int]) -> None:
        """Compares the table with the ids of the scheduler's sequences.

        Raises:
            EngineFault: They differ.
        """
        with self._changed:
            new = self._new_ids()
            if {*new, *scheduled} != set(self._states):
                raise EngineFault(f"{len(self._states)} answers are live; {len(new)} are new, the scheduler's differ.")
            if set().union(*self._ids.values()) != set(self._states):
                raise EngineFault(f"The live answers are not those of the {len(self._ids)} live requests.")

    def overloaded(self, waiting: int | None = None) -> LoramillError:
        """The error of an answer for which there is no room."""
        count = self._max_waiting if waiting is None else waiting
        return Overloaded(f"{count} requests are waiting already; try again after a moment.")

    def _wake(self) -> None:
        self._work_pending = True
        self._changed.notify_all()

    def _seconds_left(self) -> float:
        """Seconds until the next deadline."""
        while self._deadlines and self._deadlines[0][1] not in self._states:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] - time.monotonic() if self._deadlines else threading.TIMEOUT_MAX

    def _make_room(self, tenant: str) -> None:
        """Where the table is full, marks a waiting answer of a tenant that has more of them than `tenant`.

        Raises:
            Overloaded: There is none.
        """
        if len(self._states) < self._capacity:
            return
        staying = [state for state in self._states.values() if not state.overload_victim]
        if len(staying) < self._capacity:
            return
        waiting = [state for state in staying if state.waiting_since is not None]
        counts = Counter(state.request.tenant for state in waiting)
        fullest, count = next(iter(counts.most_common(1)), ("", 0))
        if count <= counts[tenant] + 1:
            raise self.overloaded(len(waiting))
        newest = next(state for state in reversed(waiting) if state.request.tenant == fullest)
        newest.overload_victim = True

    def _new_ids(self) -> set[int]:
        return {item.id for item in self._inbox if isinstance(item, RequestState)}

    def _remove(self, state: RequestState) -> None:
        del self._states[state.id]
        ids = self._ids[state.request.id]
        ids.remove(state.id)
        if not ids:
            del self._ids[state.request.id]
