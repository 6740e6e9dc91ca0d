"""What an engine counts."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable

from loramill.serve.engine.adapters.manager import AdapterManager
from loramill.serve.engine.adapters.residency import Residency
from loramill.serve.engine.durations import DurationHistogram
from loramill.serve.engine.request import RequestState
from loramill.serve.engine.scheduling.scheduler import Scheduler, StepPlan
from loramill.serve.engine.types import EngineStats, Output


class Statistics:
    """Counters and histograms since the engine's start; they outlive the state that is reset after a fault."""

    def __init__(self) -> None:
        self.load_times = DurationHistogram()
        self._queue_times = DurationHistogram()
        self._step_times = DurationHistogram()
        self._totals: Counter[str] = Counter()

    def count_start(self, state: RequestState) -> None:
        """Counts the time that an answer has waited; not again when it starts after a preemption."""
        if state.waiting_since is not None:
            self._queue_times.observe(time.monotonic() - state.waiting_since)
            state.waiting_since = None

    def count_step(self, plan: StepPlan, outputs: Iterable[Output], seconds: float) -> None:
        """Counts a step; `seconds` is the time that it ran the model."""
        self._totals["preemptions"] += len(plan.preempted)
        self._totals["generated_tokens"] += sum(len(output.tokens) for output in outputs)
        if plan.chunks:
            self._totals["steps"] += 1
            self._totals["computed_tokens"] += sum(chunk.count for chunk in plan.chunks)
            self._step_times.observe(seconds)

    def carry_over(self, scheduler: Scheduler, adapters: AdapterManager) -> None:
        """Adds the counters of a scheduler and adapters that are about to be replaced."""
        self._totals.update(_counts(scheduler, adapters))

    def snapshot(
        self, scheduler: Scheduler, residency: Residency, adapters: AdapterManager, failed_captures: int
    ) -> EngineStats:
        """The state of the engine between two steps, without the pending tokens."""
        totals, current = self._totals, _counts(scheduler, adapters)
        return EngineStats(
            waiting=scheduler.waiting,
            running=len(scheduler.running),
            blocks=scheduler.blocks,
            free_blocks=scheduler.free_blocks,
            slots=residency.slots,
            resident=residency.resident,
            loading=residency.loading,
            adapter_bytes=adapters.slab.bytes,
            host_bytes=adapters.host_bytes,
            steps=totals["steps"],
            computed_tokens=totals["computed_tokens"],
            reused_tokens=totals["reused_tokens"] + current["reused_tokens"],
            generated_tokens=totals["generated_tokens"],
            preemptions=totals["preemptions"],
            loads=totals["loads"] + current["loads"],
            load_failures=totals["load_failures"] + current["load_failures"],
            evictions=totals["evictions"] + current["evictions"],
            failed_captures=failed_captures,
            queue_times=self._queue_times.durations,
            step_times=self._step_times.durations,
            load_times=self.load_times.durations,
        )


def _counts(scheduler: Scheduler, adapters: AdapterManager) -> dict[str, int]:
    return {
        "reused_tokens": scheduler.reused_tokens,
        "loads": adapters.loads,
        "load_failures": adapters.load_failures,
        "evictions": adapters.evictions,
    }
