"""The books of a soak: what was asked for, what came, and whether it is what had to come."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from loramill.errors import AdapterInvalid, DeadlineExceeded, EngineFault, ModelNotFound, Overloaded
from loramill.serve.engine import FinishReason, Output, Request, TokenLogprobs

#: Seconds without any output for open answers until they count as lost.
PATIENCE = 20.0

#: A request's id, and which of its answers.
Key = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Said:
    """An answer as far as it got."""

    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class Canary:
    """A request that is repeated all the time, and its answers when nothing else was served."""

    request: Request
    alone: tuple[Said, ...]


@dataclass(slots=True)
class _Open:
    """An answer that is awaited.

    Attributes:
        alone: what it must say; None: nobody knows.
        due: when it must have ended after the next step, as it was cancelled or its time is up.
    """

    request: Request
    alone: Said | None
    due: float = math.inf
    cancelled: bool = False
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)


class Ledger:
    """What was asked for and what came. Clients `begin`, `refuse` and `cancel`; the thread that steps does the rest.

    Attributes:
        ends: answers by how they ended.
        compared: answers to canaries, whole or in part.
    """

    def __init__(self) -> None:
        self.ends: Counter[str] = Counter()
        self.compared = 0
        self._open: dict[Key, _Open] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._open)

    @property
    def requests(self) -> list[str]:
        """Ids of which answers are open."""
        with self._lock:
            return list(dict.fromkeys(id_ for id_, _ in self._open))

    def begin(self, request: Request, alone: tuple[Said, ...] | None) -> None:
        """A request is about to be submitted."""
        with self._lock:
            for index in range(request.sampling_params.n):
                self._open[request.id, index] = _Open(request, None if alone is None else alone[index])

    def refuse(self, request: Request) -> None:
        """It wasn't taken."""
        with self._lock:
            for index in range(request.sampling_params.n):
                del self._open[request.id, index]
            self.ends["refused"] += 1

    def cancel(self, id_: str) -> None:
        """A request is about to be cancelled."""
        with self._lock:
            for answer in self._of(id_):
                answer.cancelled = True

    def expect_end(self, id_: str, when: float) -> None:
        """After a step that begins after `when` (of the monotonic clock) nothing more may come."""
        with self._lock:
            for answer in self._of(id_):
                answer.due = min(answer.due, when)

    def overdue(self, now: float) -> list[Key]:
        """What must have ended after the next step."""
        with self._lock:
            return [key for key, answer in self._open.items() if answer.due <= now]

    def check_ended(self, keys: Iterable[Key]) -> None:
        """Raises EngineFault if one of them is still open."""
        left = [key for key in keys if key in self._open]
        if left:
            raise EngineFault(f"Answers {left} were cancelled or out of time before a step, and live on after it.")

    def check_flow(self, since: float) -> None:
        """Raises EngineFault with the answers that nobody gives, if nothing came for so many seconds."""
        if since > PATIENCE:
            with self._lock:
                waiting = [f"{id_}[{i}] of version {a.request.version}" for (id_, i), a in self._open.items()]
            raise EngineFault(f"No output for {since:.0f} s, and {len(waiting)} answers are open: {waiting}.")

    def take(self, output: Output) -> None:
        """Raises EngineFault if an output isn't awaited or says what it must not."""
        key = (output.request_id, output.index)
        with self._lock:
            answer = self._open.get(key)
            if answer is None:
                raise EngineFault(f"An output for answer {key}, which has ended or was never asked for: {output}.")
            if output.finish_reason is not None:
                del self._open[key]
        answer.tokens += output.tokens
        answer.logprobs += output.logprobs
        wrong = _wrong(answer, output)
        if wrong:
            raise EngineFault(f"Answer {key} {wrong}. It was {answer.request}; the last output is {output}.")
        if output.finish_reason is not None:
            self.compared += answer.alone is not None
            error = type(output.error).__name__ if output.error is not None else ""
            self.ends[error or output.finish_reason] += 1

    def _of(self, id_: str) -> list[_Open]:
        return [answer for (its, _), answer in self._open.items() if its == id_]


def _wrong(answer: _Open, output: Output) -> str:
    """What is wrong with an answer after an output, in words; empty: nothing."""
    request, sampling = answer.request, answer.request.sampling_params
    told = len(request.tokens) if sampling.echo and answer.tokens else 0
    own = answer.tokens[told:]
    timed = request.timeout_seconds is not None
    assert sampling.max_tokens is not None  # traffic.py limits every request
    known = {
        FinishReason.LENGTH: len(own) == sampling.max_tokens and bool(told) == sampling.echo,
        FinishReason.STOP: bool(sampling.stop_ids) and sampling.min_tokens <= len(own) < sampling.max_tokens,
        FinishReason.CANCELLED: answer.cancelled and not output.tokens,
        FinishReason.ERROR: (timed and isinstance(output.error, DeadlineExceeded))
        # Another tenant's got its place to wait.
        or (isinstance(output.error, Overloaded) and not answer.tokens)
        or (request.version is not None and isinstance(output.error, (ModelNotFound, AdapterInvalid))),
        None: len(own) < sampling.max_tokens and bool(output.tokens),
    }
    if not known[output.finish_reason]:
        return f"ended by {output.finish_reason} ({output.error!r}) with {len(own)} tokens"
    if told and tuple(answer.tokens[:told]) != request.tokens:
        return "echoes another prompt"
    if not set(own).isdisjoint(sampling.stop_ids):
        return "goes on behind a stop token"
    if len(answer.logprobs) != (0 if sampling.logprobs is None else len(answer.tokens)):
        return f"has {len(answer.logprobs)} log probabilities for {len(answer.tokens)} tokens"
    return "" if answer.alone is None else _differs(answer, answer.alone, output.finish_reason)


def _differs(answer: _Open, alone: Said, finish: FinishReason | None) -> str:
    count = len(answer.tokens)
    if tuple(answer.tokens) != alone.tokens[:count]:
        return f"says {answer.tokens}; alone it was {list(alone.tokens)}"
    if tuple(answer.logprobs) != alone.logprobs[: len(answer.logprobs)]:
        return f"has the log probabilities {answer.logprobs}; alone they were {alone.logprobs}"
    if finish in (FinishReason.LENGTH, FinishReason.STOP) and (finish, count) != (alone.finish, len(alone.tokens)):
        return f"ended by {finish} with {count} tokens; alone by {alone.finish} with {len(alone.tokens)}"
    return ""
