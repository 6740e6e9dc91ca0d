"""Continuous batching: many requests, many adapters, one forward a step."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from dataclasses import dataclass, replace

import torch

from loramill.errors import AdapterInvalid, Conflict, EngineFault, LoramillError, Overloaded, Unavailable
from loramill.kernels import Batch, backend
from loramill.serve.engine.adapters import Adapters
from loramill.serve.engine.admission import answer_limit
from loramill.serve.engine.sampling import GREEDY_BELOW, logprobs_of, new_generator, sample
from loramill.serve.engine.scheduler import Plan, Scheduler, Sequence, Share
from loramill.serve.engine.values import AdapterSource, EngineConfig, EngineStats, Finish, Output, Request
from loramill.serve.model import Chunk, Decoder

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Live:
    """A request between its submit and its last output; `limit` in tokens of the answer."""

    request: Request
    limit: int
    tokens: list[int]
    generator: torch.Generator

    @property
    def generated(self) -> int:
        return len(self.tokens) - len(self.request.tokens)


class Engine:
    """Serves requests for one base and any number of its adapters.

    One thread calls `step` and `check_integrity`; any thread may call the rest.
    """

    def __init__(self, model: Decoder, source: AdapterSource, config: EngineConfig) -> None:
        # A wrong setting shows now, and not in the first step with an adapter.
        backend()
        self._model = model
        self._source = source
        self._config = config
        self._changed = threading.Condition()
        self._stirred = False
        self._closed = False
        # In the order of the calls: requests, and ids to cancel.
        self._inbox: list[_Live | str] = []
        self._live: dict[str, _Live] = {}
        self._totals: Counter[str] = Counter()
        self._open_books()
        self._stats = self._look()

    def _open_books(self) -> None:
        c = self._config
        blocks = c.kv_tokens // c.block_size
        self._cache = self._model.new_cache(blocks, c.block_size)
        self._scheduler = Scheduler(blocks, c.block_size, c.max_batch_tokens, c.max_sequences)
        self._adapters = Adapters(self._model, self._source, c, self._stir)

    def submit(self, request: Request) -> None:
        """Takes a request; its outputs come from `step`.

        Raises:
            InvalidRequest: a field makes no sense.
            ContextLengthExceeded: the prompt leaves no room for an answer.
            Conflict: a request of this id is being served.
            Overloaded: too many are waiting.
            Unavailable: the engine is closed.
        """
        c = self._config
        limit = answer_limit(
            request,
            vocabulary=self._model.config.vocabulary,
            context_length=self._model.config.context_length,
            kv_tokens=c.kv_tokens // c.block_size * c.block_size,
        )
        live = _Live(request, limit, list(request.tokens), new_generator(request.sampling))
        with self._changed:
            if self._closed:
                raise Unavailable("The engine is closed.")
            if request.id in self._live:
                raise Conflict(f"A request with the id {request.id} is being served; ids must differ.")
            # Stats count what the last step left waiting or running; the rest of the live came since.
            waiting = len(self._live) - self._stats.running
            if waiting >= c.max_waiting:
                raise Overloaded(f"{waiting} requests are waiting already; try again after a moment.")
            self._live[request.id] = live
            self._inbox.append(live)
        self._stir()

    def cancel(self, request_id: str) -> None:
        """Ends a request with an output CANCELLED from the next step; nothing happens if it has ended."""
        with self._changed:
            self._inbox.append(request_id)
        self._stir()

    @property
    def has_work(self) -> bool:
        """Whether a step may get something done now; False also while requests wait for adapters being fetched."""
        return self._stirred

    def wait(self, timeout: float) -> bool:
        """Blocks until there may be work for `step`, at most `timeout` seconds; tells whether there is."""
        with self._changed:
            return self._changed.wait_for(lambda: self._stirred, timeout)

    @property
    def stats(self) -> EngineStats:
        """A look at the engine after its last step, with the requests that wait by now."""
        with self._changed:
            return replace(self._stats, waiting=max(0, len(self._live) - self._stats.running))

    def step(self) -> list[Output]:
        """Takes in what was submitted, cancelled and loaded, then runs the decoder once.

        Never raises for what a request or an adapter does: it gets an output with an error, and the engine goes on.
        """
        with self._changed:
            self._stirred = False
            inbox, self._inbox = self._inbox, []
        outputs: list[Output] = []
        try:
            self._take_in(inbox, outputs)
            plan = self._scheduler.plan(self._adapters.ready)
            for id_ in plan.admitted:
                self._adapters.pin(self._live[id_].request.version)
            for id_ in plan.preempted:
                self._adapters.unpin(self._live[id_].request.version)
            if plan.shares:
                self._run(plan, outputs)
            self._count(plan, outputs)
        except Exception as error:
            # The books may be half written and nobody's state can be trusted: all end, and the books begin anew.
            log.exception("a step failed outside the decoder")
            outputs += self._start_over(error)
        with self._changed:
            self._stirred |= bool(outputs) or bool(self._scheduler.running)
            self._stats = self._look()
        return outputs

    def check_integrity(self) -> None:
        """Compares all books: blocks, queues, slots, pins. May be called between any two steps.

        Raises:
            EngineFault: they don't add up.
        """
        self._scheduler.check_integrity()
        users = Counter(s.version for s in self._scheduler.sequences if s.version is not None)
        pins = Counter(s.version for s in self._scheduler.running if s.version is not None)
        self._adapters.check_integrity(dict(users), dict(pins))
        with self._changed:
            fresh = [live.request.id for live in self._inbox if isinstance(live, _Live)]
            if {*fresh, *(s.id for s in self._scheduler.sequences)} != set(self._live):
                raise EngineFault(f"{len(self._live)} requests live; {len(fresh)} are new, the scheduler's differ.")

    def close(self) -> None:
        """Refuses further requests and ends the side threads; live requests get no further output."""
        with self._changed:
            self._closed = True
        self._adapters.close()

    def _stir(self) -> None:
        with self._changed:
            self._stirred = True
            self._changed.notify_all()

    def _take_in(self, inbox: list[_Live | str], outputs: list[Output]) -> None:
        for item in inbox:
            if isinstance(item, _Live):
                request = item.request
                self._scheduler.add(Sequence(request.id, request.tenant, request.version, known=len(request.tokens)))
                self._adapters.want(request.version)
            elif item in self._scheduler:
                outputs.append(self._finish(item, Finish.CANCELLED))
        for version, error in self._adapters.take_loaded():
            waiting = [sequence.id for sequence in self._scheduler.sequences if sequence.version == version]
            outputs += [self._finish(id_, Finish.ERROR, error=error) for id_ in waiting]
        self._adapters.advance()

    def _run(self, plan: Plan, outputs: list[Output]) -> None:
        # Sorted by adapter, so that each is one run of rows.
        shares = sorted(plan.shares, key=lambda share: self._slot_order(share.id))
        try:
            logits = self._forward(shares)
            highest, likeliest = logits.max(-1)
        except Exception as error:
            log.exception("the decoder failed", extra={"requests": [share.id for share in shares]})
            fault = EngineFault(f"The decoder failed in a step with {len(shares)} requests: {error!r}.")
            outputs += [self._finish(share.id, Finish.ERROR, error=fault) for share in shares]
            return
        self._scheduler.commit(plan)
        sampled = [share.id for share in shares if share.sampled]
        for id_, row, good, first in zip(sampled, logits, highest.isfinite().tolist(), likeliest.tolist(), strict=True):
            outputs.append(self._next_token(id_, row, first) if good else self._finish_broken(id_))

    def _slot_order(self, id_: str) -> int:
        slot = self._adapters.slot(self._live[id_].request.version)
        return -1 if slot is None else slot.index

    def _forward(self, shares: list[Share]) -> torch.Tensor:
        chunks: list[Chunk] = []
        for share in shares:
            tokens = self._live[share.id].tokens[share.start : share.start + share.count]
            chunks.append(Chunk(tokens, share.start, self._scheduler.get(share.id).blocks, int(share.sampled)))
        runs = [(self._adapters.slot(self._live[share.id].request.version), share.count) for share in shares]
        return self._model.forward(chunks, self._cache, self._adapters.slab, Batch.of(runs))

    def _next_token(self, id_: str, logits: torch.Tensor, likeliest: int) -> Output:
        live = self._live[id_]
        sampling = live.request.sampling
        greedy = sampling.temperature < GREEDY_BELOW
        token = likeliest if greedy else sample(logits, sampling, live.generator)
        if token in sampling.stop_ids:
            return self._finish(id_, Finish.STOP)
        live.tokens.append(token)
        if live.generated == live.limit:
            output = self._finish(id_, Finish.LENGTH, tokens=(token,))
        else:
            self._scheduler.extend(id_)
            output = Output(id_, (token,))
        if sampling.logprobs is None:
            return output
        return replace(output, logprobs=(logprobs_of(logits, token, sampling.logprobs),))

    def _finish_broken(self, id_: str) -> Output:
        version = self._live[id_].request.version
        error: LoramillError = EngineFault("The base gave logits that are no numbers.")
        if version is not None:
            error = AdapterInvalid(f"Version {version} gives logits that are no numbers: its weights are broken.")
        return self._finish(id_, Finish.ERROR, error=error)

    def _finish(
        self, id_: str, finish: Finish, *, tokens: tuple[int, ...] = (), error: LoramillError | None = None
    ) -> Output:
        sequence = self._scheduler.get(id_)
        if sequence in self._scheduler.running:
            self._adapters.unpin(sequence.version)
        self._adapters.unwant(sequence.version)
        self._scheduler.remove(id_)
        with self._changed:
            del self._live[id_]
        return Output(id_, tokens, finish, error)

    def _start_over(self, error: Exception) -> list[Output]:
        with self._changed:
            fresh = {item.request.id for item in self._inbox if isinstance(item, _Live)}
            ended = [id_ for id_ in self._live if id_ not in fresh]
            for id_ in ended:
                del self._live[id_]
        # Not waiting for fetches: what they bring is of no use any more, and a slow one would hold up everybody.
        self._adapters.close(wait=False)
        self._open_books()
        fault = EngineFault(f"A step failed: {error!r}.")
        return [Output(id_, (), Finish.ERROR, fault) for id_ in ended]

    def _count(self, plan: Plan, outputs: list[Output]) -> None:
        self._totals["steps"] += bool(plan.shares)
        self._totals["computed_tokens"] += sum(share.count for share in plan.shares)
        self._totals["generated_tokens"] += sum(len(output.tokens) for output in outputs)
        self._totals["preemptions"] += len(plan.preempted)

    def _look(self) -> EngineStats:
        return EngineStats(
            waiting=self._scheduler.waiting,
            running=len(self._scheduler.running),
            blocks=self._scheduler.blocks,
            free_blocks=self._scheduler.free_blocks,
            resident=self._adapters.resident,
            loading=self._adapters.loading,
            adapter_bytes=self._adapters.slab.bytes,
            loads=self._adapters.loads,
            load_failures=self._adapters.failures,
            steps=self._totals["steps"],
            computed_tokens=self._totals["computed_tokens"],
            generated_tokens=self._totals["generated_tokens"],
            preemptions=self._totals["preemptions"],
        )
