"""Tracks the open answers of a soak test, and checks every output."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from loramill.errors import AdapterInvalid, DeadlineExceeded, EngineFault, ModelNotFound, Overloaded
from loramill.serve.engine import FinishReason, Output, Request, TokenLogprobs

#: Seconds without any output after which open answers count as lost.
PATIENCE = 20.0

#: A request's id, and the index of one of its answers.
Key = tuple[str, int]


@dataclass(frozen=True, slots=True)
class ExpectedAnswer:
    """The answer to a request that was served alone."""

    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class Canary:
    """A request that is repeated during the run, with its answers when it was served alone."""

    request: Request
    expected: tuple[ExpectedAnswer, ...]


@dataclass(slots=True)
class _OpenAnswer:
    """An answer that has not ended.

    Attributes:
        request: Its request.
        expected: The answer that it must equal; None: unknown.
        end_after: Time by the monotonic clock from which on the next step must end it, since it was cancelled or timed
            out.
        cancelled: Whether its request was cancelled.
        tokens: Tokens so far.
        logprobs: Log probabilities so far.
    """

    request: Request
    expected: ExpectedAnswer | None
    end_after: float = math.inf
    cancelled: bool = False
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)


class AnswerTracker:
    """The open answers, shared by the clients and the stepping thread.

    Clients call `add`, `remove_refused`, `mark_cancelled` and `expect_end`; the stepping thread calls the rest.

    Attributes:
        ends: Number of answers by finish reason or error.
        compared: Number of answers that were compared with the expected ones.
    """

    def __init__(self) -> None:
        self.ends: Counter[str] = Counter()
        self.compared = 0
        self._open: dict[Key, _OpenAnswer] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._open)

    @property
    def open_request_ids(self) -> list[str]:
        """Ids of the requests with open answers."""
        with self._lock:
            return list(dict.fromkeys(id_ for id_, _ in self._open))

    def add(self, request: Request, expected: tuple[ExpectedAnswer, ...] | None) -> None:
        """Adds the answers of a request that is about to be submitted."""
        with self._lock:
            for index in range(request.sampling_params.n):
                self._open[request.id, index] = _OpenAnswer(request, None if expected is None else expected[index])

    def remove_refused(self, request: Request) -> None:
        """Removes the answers of a request that the engine refused."""
        with self._lock:
            for index in range(request.sampling_params.n):
                del self._open[request.id, index]
            self.ends["refused"] += 1

    def mark_cancelled(self, id_: str) -> None:
        """Marks the answers of a request that is about to be cancelled."""
        with self._lock:
            for answer in self._answers_of(id_):
                answer.cancelled = True

    def expect_end(self, id_: str, time: float) -> None:
        """Expects that a step which begins after `time` (monotonic clock) ends the request's answers."""
        with self._lock:
            for answer in self._answers_of(id_):
                answer.end_after = min(answer.end_after, time)

    def overdue(self, now: float) -> list[Key]:
        """The answers that the next step must end."""
        with self._lock:
            return [key for key, answer in self._open.items() if answer.end_after <= now]

    def check_ended(self, keys: Iterable[Key]) -> None:
        """Raises EngineFault if one of these answers is still open."""
        left = [key for key in keys if key in self._open]
        if left:
            raise EngineFault(f"Answers {left} were cancelled or timed out before a step, and are still open after it.")

    def check_progress(self, idle_seconds: float) -> None:
        """Raises EngineFault with the open answers if there was no output for longer than `PATIENCE`."""
        if idle_seconds > PATIENCE:
            with self._lock:
                waiting = [f"{id_}[{i}] of version {a.request.version}" for (id_, i), a in self._open.items()]
            raise EngineFault(f"No output for {idle_seconds:.0f} s, and {len(waiting)} answers are open: {waiting}.")

    def check_output(self, output: Output) -> None:
        """Adds an output to its answer. Raises EngineFault if the answer is not open or the output is wrong."""
        key = (output.request_id, output.index)
        with self._lock:
            answer = self._open.get(key)
            if answer is None:
                raise EngineFault(f"Output for answer {key}, which has ended or was not requested: {output}.")
            if output.finish_reason is not None:
                del self._open[key]
        answer.tokens += output.tokens
        answer.logprobs += output.logprobs
        wrong = _fault(answer, output)
        if wrong:
            raise EngineFault(f"Answer {key} {wrong}. The request is {answer.request}; the last output is {output}.")
        if output.finish_reason is not None:
            self.compared += answer.expected is not None
            error = type(output.error).__name__ if output.error is not None else ""
            self.ends[error or output.finish_reason] += 1

    def _answers_of(self, id_: str) -> list[_OpenAnswer]:
        return [answer for (request_id, _), answer in self._open.items() if request_id == id_]


def _fault(answer: _OpenAnswer, output: Output) -> str:
    """What is wrong with an answer after an output, as the end of a sentence; empty if nothing is."""
    request, sampling = answer.request, answer.request.sampling_params
    echoed = len(request.tokens) if sampling.echo and answer.tokens else 0
    generated = answer.tokens[echoed:]
    timed = request.timeout_seconds is not None
    assert sampling.max_tokens is not None  # traffic.py limits every request
    allowed = {
        FinishReason.LENGTH: len(generated) == sampling.max_tokens and bool(echoed) == sampling.echo,
        FinishReason.STOP: bool(sampling.stop_ids) and sampling.min_tokens <= len(generated) < sampling.max_tokens,
        FinishReason.CANCELLED: answer.cancelled and not output.tokens,
        FinishReason.ERROR: (timed and isinstance(output.error, DeadlineExceeded))
        # Another tenant's request took its place in the waiting queue.
        or (isinstance(output.error, Overloaded) and not answer.tokens)
        or (request.version is not None and isinstance(output.error, (ModelNotFound, AdapterInvalid))),
        None: len(generated) < sampling.max_tokens and bool(output.tokens),
    }
    if not allowed[output.finish_reason]:
        return f"ended by {output.finish_reason} ({output.error!r}) with {len(generated)} tokens"
    if echoed and tuple(answer.tokens[:echoed]) != request.tokens:
        return "echoes another prompt"
    if not set(generated).isdisjoint(sampling.stop_ids):
        return "continues after a stop token"
    if len(answer.logprobs) != (0 if sampling.logprobs is None else len(answer.tokens)):
        return f"has {len(answer.logprobs)} log probabilities for {len(answer.tokens)} tokens"
    return "" if answer.expected is None else _difference(answer, answer.expected, output.finish_reason)


def _difference(answer: _OpenAnswer, expected: ExpectedAnswer, finish: FinishReason | None) -> str:
    count = len(answer.tokens)
    if tuple(answer.tokens) != expected.tokens[:count]:
        return f"has the tokens {answer.tokens}; alone they were {list(expected.tokens)}"
    if tuple(answer.logprobs) != expected.logprobs[: len(answer.logprobs)]:
        return f"has the log probabilities {answer.logprobs}; alone they were {expected.logprobs}"
    if finish in (FinishReason.LENGTH, FinishReason.STOP) and (finish, count) != (
        expected.finish,
        len(expected.tokens),
    ):
        return f"ended by {finish} with {count} tokens; alone by {expected.finish} with {len(expected.tokens)}"
    return ""
