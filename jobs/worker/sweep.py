"""Trains the candidates of a sweep by shared passes, drops the weak ones early, and publishes the best. No Ray.

Each candidate is a training of its own, with checkpoints in a subfolder of the job's. It waits at each rung until the
others have come there. Before any trains on, the registry has the losses: whatever happens then, another attempt
decides the same.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import Executor as ThreadPool
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path

from loramill import halving
from loramill.errors import JobCancelled, JobError, JobPaused, JobPreempted, LeaseLost, OutOfMemory
from loramill.jobs.train.checkpoint import RunState
from loramill.jobs.train.context import TrainContext, TrainingProgress
from loramill.jobs.train.engine import Together, Work
from loramill.jobs.train.loop import open_run
from loramill.jobs.worker import publish
from loramill.jobs.worker.lease import Lease, outlast_database_outage
from loramill.jobs.worker.loggers import open_loggers
from loramill.jobs.worker.worker import PERMANENT_ERRORS, Worker, remove_checkpoints
from loramill.registry import jobs
from loramill.types import JobRecord, SweepCandidate

log = logging.getLogger(__name__)

#: Errors that concern the whole job.
_JOB_ERRORS = (LeaseLost, JobCancelled, JobPaused, JobPreempted, OutOfMemory)


def train_best(
    worker: Worker, job: JobRecord, lease: Lease, context: TrainContext, background: ThreadPool
) -> Work[None]:
    """Trains the candidates of a sweep and publishes the version of the best, which ends the job.

    Args:
        context: of the job; all candidates use its examples.
        background: writes to the registry and the stores while passes run.

    Raises:
        JobError: every candidate has failed.
        LoramillError: the job has to stop, or the registry or a store can't be used.
    """
    sweep = _Sweep(worker, job, lease, context, background)
    try:
        best = yield from sweep.train()
    finally:
        lease.flush()
    record = job.model_copy(update={"spec": job.spec.trained_specs[best]})
    yield background.submit(publish.version, worker, record, lease.last_progress, sweep.location(best))


class _Sweep:
    """The candidates of one attempt. Candidates are named by their index; users see numbers from 1."""

    def __init__(
        self, worker: Worker, job: JobRecord, lease: Lease, context: TrainContext, background: ThreadPool
    ) -> None:
        self._worker, self._job, self._lease, self._background = worker, job, lease, background
        self._specs, self._candidates = job.spec.trained_specs, list(job.sweep)
        self._ladder = halving.rungs(len(self._specs), job.spec.steps)
        self._context = replace(
            context,
            validated_steps=frozenset(rung.step for rung in self._ladder),
            raise_if_stopped=self._raise_if_stopped,
        )
        self._decided = self._standing().decided
        self._progress: dict[int, TrainingProgress] = {}
        self._waiting: dict[int, tuple[int, Future[bool]]] = {}
        self._error: Exception | None = None

    def location(self, index: int) -> Path | str:
        """Folder or URL of a candidate's checkpoints."""
        folder, name = self._worker.checkpoint_location(self._job), f"candidate-{index + 1}"
        return f"{folder}/{name}" if isinstance(folder, str) else folder / name

    def train(self) -> Work[int]:
        """Trains the candidates until one is left; returns its index.

        If an earlier attempt has found the best, it is trained again only if its checkpoints are gone.
        """
        if live := self._standing().live:
            yield Together([self._candidate(index) for index in live])
        if self._error is not None:
            raise self._error
        left = self._standing().live
        if not left:
            reasons = "; ".join(f"{each.number}: {each.error}" for each in self._candidates if each.error)
            raise JobError(f"No candidate of the sweep is left. Candidate {reasons}")
        return left[0]

    def _raise_if_stopped(self) -> None:
        self._lease.raise_if_stopped()
        if self._error is not None:
            raise JobPaused("The attempt ends, since another candidate can't be trained now.")

    def _candidate(self, index: int) -> Work[None]:
        """Trains a candidate until it is dropped or done. What fails it alone is recorded, and the others continue."""
        try:
            kept = yield from self._train(index)
        except Exception as error:  # noqa: BLE001 - whatever it is, the job's attempt ends with it
            self._fail(index, error)
        else:
            if not kept:
                yield self._background.submit(remove_checkpoints, self._worker, self._job, self.location(index))

    def _train(self, index: int) -> Work[bool]:
        """Trains a candidate from its last checkpoint; returns whether it was kept to the end."""
        worker, spec, location = self._worker, self._specs[index], self.location(index)
        run_name = f"{self._job.id}-{index + 1}"
        with (
            open_loggers(worker.settings.loggers, run=run_name, spec=spec, folder=worker.logs) as log_progress,
            open_run(worker.model(), replace(self._context, spec=spec, checkpoints=location)) as run,
        ):
            self._note(index, run.state)
            for number, rung in enumerate(self._ladder):
                while not run.state.finished and (run.state.pending or run.state.step < rung.step):
                    progress = yield from run.advance()
                    self._report(index, progress, run.state)
                    log_progress(progress)
                if not (yield self._arrive(index, number, run.state)):
                    return False
        return True

    def _report(self, index: int, progress: TrainingProgress, state: RunState) -> None:
        """Reports a step of a candidate."""
        self._progress[index] = progress
        self._note(index, state)
        self._lease.report_metrics(progress, index + 1)
        self._report_job()

    def _report_job(self) -> None:
        """Reports the job: it is as far as its slowest candidate, and its losses are those of its best candidate.

        The best had the lowest loss at the last rung that is decided; before that, it is the first that took a step.
        """
        live = self._standing().live
        best = min(
            (index for index in live if index in self._progress),
            key=lambda each: self._candidates[each].rung_losses[: self._decided][-1:],
            default=None,  # no candidate has taken a step in this attempt
        )
        if best is not None:
            shown = replace(
                self._progress[best],
                step=min(self._candidates[each].step for each in live),
                trained_tokens=sum(each.trained_tokens for each in self._candidates),
            )
            self._lease.report_progress(shown)
        self._lease.report_sweep(tuple(self._candidates))

    def _note(self, index: int, state: RunState) -> None:
        known = self._candidates[index]
        self._change(
            index,
            step=state.step,
            trained_tokens=state.tokens,
            valid_loss=(state.figures or {}).get("valid_loss", known.valid_loss),
            best_valid_loss=known.best_valid_loss if state.best_loss is None else state.best_loss,
        )

    def _change(self, index: int, **fields: object) -> None:
        self._candidates[index] = self._candidates[index].model_copy(update=fields)

    def _standing(self) -> halving.Standing:
        losses = [each.rung_losses for each in self._candidates]
        failed = {index for index, each in enumerate(self._candidates) if each.state == "failed"}
        return halving.standing(self._ladder, losses, failed)

    def _arrive(self, index: int, number: int, state: RunState) -> Future[bool]:
        """Notes a candidate's loss at a rung; returns a future of whether it trains on."""
        trains_on: Future[bool] = Future()
        if self._error is not None:
            trains_on.set_exception(self._error)
            return trains_on
        losses = self._candidates[index].rung_losses
        if len(losses) == number:
            self._change(index, rung_losses=(*losses, self._loss(state)))
        self._waiting[index] = number, trains_on
        self._settle()
        return trains_on

    def _loss(self, state: RunState) -> float:
        """The loss of the weights that would be published."""
        figures = state.figures or {}
        if self._job.spec.keep == "best" and state.best_loss is not None:
            return state.best_loss
        return figures.get("valid_loss", figures["loss"])

    def _settle(self) -> None:
        """Lets the candidates that wait train on or end, if their rung is decided and once the registry knows it."""
        standing = self._standing()
        settled = {index: each for index, each in self._waiting.items() if each[0] < standing.decided}
        if not settled:
            return
        for index in settled:
            del self._waiting[index]
        written: Future[None] = Future()
        if standing.decided > self._decided:
            self._decided = standing.decided
            self._mark(standing)
            written = self._background.submit(self._record, standing)
        else:
            written.set_result(None)
        written.add_done_callback(partial(_release, standing, settled))

    def _mark(self, standing: halving.Standing) -> None:
        for index in standing.dropped:
            self._change(index, state="dropped")
        if standing.decided == len(self._ladder):
            for index in standing.live:
                self._change(index, state="best")
        self._report_job()

    def _record(self, standing: halving.Standing) -> None:
        """Writes what is decided; runs in a thread."""
        self._lease.flush()
        step, live = self._ladder[standing.decided - 1].step, [self._candidates[index] for index in standing.live]
        message = f"Step {step}: of {len(self._candidates)} candidates, these train on: {_described(live)}."
        if standing.decided == len(self._ladder):
            message = f"The best of {len(self._candidates)} candidates is {_described(live)}."

        def add() -> None:
            with self._worker.registry.writing() as session:
                jobs.add_event(session, self._job.id, message)

        outlast_database_outage(add)

    def _fail(self, index: int, error: Exception) -> None:
        """Drops a candidate whose error is its own; any other error ends the attempt."""
        if isinstance(error, PERMANENT_ERRORS) and not isinstance(error, _JOB_ERRORS):
            log.warning("job %s: candidate %d failed: %s", self._job.id, index + 1, error)
            self._change(index, state="failed", error=error.message)
            self._lease.report_sweep(tuple(self._candidates))
            self._settle()
            return
        self._error = self._error or error
        waiting, self._waiting = self._waiting, {}
        for _, trains_on in waiting.values():
            trains_on.set_exception(self._error)


def _release(
    standing: halving.Standing, settled: Mapping[int, tuple[int, Future[bool]]], written: Future[None]
) -> None:
    error = written.exception()
    for index, (_, trains_on) in settled.items():
        if error is None:
            trains_on.set_result(index in standing.live)
        else:
            trains_on.set_exception(error)


def _described(candidates: list[SweepCandidate]) -> str:
    return "; ".join(
        f"{each.number} ({', '.join(f'{name}={value}' for name, value in each.values.items())}; validation loss "
        f"{each.rung_losses[-1]:.4g})"
        for each in candidates
    )
