"""Trains one adapter on a resident base. Plain torch and PEFT: no Ray, no registry.

    progress = train(model, examples, held_out, spec, folder=base.folder, checkpoints=place)
    for point in progress: ...              # may be left at any step; the next call goes on from the last checkpoint
    files = export(place, spec, base="smollm2-135m")

The same spec and data give the same bits, also after a kill: order and dropout are functions of (seed, step), and a
checkpoint holds the weights, AdamW's moments and what the method keeps. (On another number of threads or processes, or
with other `micro_tokens`, the last bits may differ.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from loramill.data.tokenizer import EncodedExample
from loramill.errors import ArtifactMissing, DatasetInvalid, JobPaused, JobPreempted, TrainingDiverged
from loramill.jobs.train import checkpoint
from loramill.jobs.train.batching import choose_batch, group_for_passes, sequences, supervised_weight
from loramill.jobs.train.checkpoint import CheckpointData, RunState
from loramill.jobs.train.distributed import SINGLE_PROCESS, ProcessGroup
from loramill.jobs.train.forward import configured_forward, loss_and_accuracy, translate_oom
from loramill.jobs.train.lr_schedule import learning_rate
from loramill.jobs.train.methods import adapter_files, attach_adapter, load_start_adapter
from loramill.jobs.train.methods.adapted_model import AdaptedModel
from loramill.jobs.train.methods.seeds import seeded
from loramill.jobs.train.optimizer import AdamW, OptimizerState
from loramill.types import JobSpec

__all__ = ["SINGLE_PROCESS", "ProcessGroup", "TrainingProgress", "export_adapter", "train"]


@dataclass(frozen=True, slots=True)
class TrainingProgress:
    """One optimizer step done.

    Attributes:
        step: 1 to `steps`; an early stop ends before.
        loss: weighted mean cross-entropy of the step's learnt tokens, in nats, before its update.
        accuracy: weighted share of these tokens that were the likeliest.
        grad_norm: before clipping.
        tokens: trained on so far, prompts included.
        valid_loss, valid_accuracy: the same over the validation examples, after the update; None where the job isn't
            validated.
        best: whether this is the lowest validation loss so far.
    """

    step: int
    total_steps: int
    loss: float
    accuracy: float
    learning_rate: float
    grad_norm: float
    trained_tokens: int
    valid_loss: float | None = None
    valid_accuracy: float | None = None
    is_best: bool = False

    @property
    def metrics(self) -> dict[str, float]:
        """The figures under OpenAI's names of a checkpoint's metrics."""
        metrics = {"step": self.step, "train_loss": self.loss, "train_mean_token_accuracy": self.accuracy}
        if self.valid_loss is not None and self.valid_accuracy is not None:
            for name in ("valid", "full_valid"):  # always over the whole file
                metrics |= {f"{name}_loss": self.valid_loss, f"{name}_mean_token_accuracy": self.valid_accuracy}
        return metrics


def no_check() -> None:
    """A job that nobody stops."""


def train(
    model: PreTrainedModel,
    train: Sequence[EncodedExample],
    valid: Sequence[EncodedExample],
    spec: JobSpec,
    *,
    folder: Path,
    checkpoints: Path | str,
    start_from: Path | None = None,
    check: Callable[[], None] = no_check,
    micro_tokens: int | None = None,
    processes: ProcessGroup = SINGLE_PROCESS,
    attach: Callable[[PreTrainedModel, JobSpec, Path], AbstractContextManager[AdaptedModel]] = attach_adapter,
) -> Generator[TrainingProgress, None, None]:
    """Trains as `spec` says, from the last checkpoint in `checkpoints` if there is one; yields after every step.

    Args:
        model: the frozen base, in any floating dtype. It is in use until the generator ends or is closed, and is then
            exactly as before.
        valid: held-out examples; may be empty, and then nothing is validated, and nothing stops early.
        folder: the base's files.
        checkpoints: a folder, or an fsspec URL, of this job's own.
        start_from: a PEFT folder whose weights training begins from, for the same rank, targets and scale.
        check: called before every forward pass; what it raises ends the training at once, after a checkpoint of the
            last whole step where that is JobPaused or JobPreempted.
        micro_tokens: instead of the spec's, where memory ran out; the result is the same to rounding.
        processes: that share each step's passes; each calls this alike, and gets the same points.
        attach: puts on the model what is trained, if not what the spec's method says.

    Raises:
        DatasetInvalid: an example has no token to learn.
        TrainingDiverged: loss or gradient is not finite; checkpoints stay.
        OutOfMemory: in a pass, with what is next.
        InvalidRequest: the base lacks a target.
        AdapterInvalid: `start_from` doesn't fit.
        DiskFull: no room for a checkpoint.
        ArtifactCorrupt: a checkpoint can't be read.
    """
    _check_supervised(train, "training")
    if valid:
        _check_supervised(valid, "validation")
    limit = micro_tokens or spec.micro_tokens
    longest = max(len(example.tokens) for example in sequences((*train, *valid)))
    with (
        translate_oom(limit, longest),
        attach(model, spec, folder) as tuned,
        configured_forward(model, longest + limit, checkpointing=spec.gradient_checkpointing),
    ):
        run = _Run(model, tuned, spec, train, valid, checkpoints, check, limit, processes)
        run.begin(start_from)
        while not run.standing.finished:
            yield run.advance()


def export_adapter(checkpoints: Path | str, spec: JobSpec, *, base: str, best: bool = True) -> dict[str, bytes]:
    """The adapter as PEFT's files, by name.

    Args:
        base: the base's name on the wire.
        best: the job's result, of the weights that `spec.keep` names; otherwise those of the last checkpoint, and
            training may still go on.

    Raises:
        ArtifactMissing: there is no checkpoint, or, for the result, the job is not at its end.
        ArtifactCorrupt: a checkpoint can't be read.
    """
    found = load_checkpoint_to_export(checkpoints, spec, best=best)
    return adapter_files(spec, found.weights, found.state, base)


def load_checkpoint_to_export(checkpoints: Path | str, spec: JobSpec, *, best: bool = True) -> CheckpointData:
    """The checkpoint that `export` makes the adapter of.

    Raises:
        ArtifactMissing, ArtifactCorrupt: as for `export`.
    """
    last = checkpoint.latest(checkpoints, spec)
    if last is None or (best and not last.run_state.finished):
        raise ArtifactMissing(
            f"{checkpoints} holds no whole checkpoint of {'the end of ' if best else ''}this job, which is step "
            f"{spec.steps} or an early stop: train to the end first."
        )
    return checkpoint.best(checkpoints, spec, last) if best and spec.keep == "best" else last


class _Run:
    """A job in training; `standing` is how far it is."""

    def __init__(
        self,
        model: PreTrainedModel,
        tuned: AdaptedModel,
        spec: JobSpec,
        train: Sequence[EncodedExample],
        valid: Sequence[EncodedExample],
        checkpoints: Path | str,
        check: Callable[[], None],
        limit: int,
        processes: ProcessGroup,
    ) -> None:
        self.standing = RunState()
        self._saved = self.standing
        self._model, self._tuned, self._spec = model, tuned, spec
        self._train, self._valid, self._checkpoints = train, valid, checkpoints
        self._check, self._limit, self._processes = check, limit, processes
        self._update = tuned.optimizer or AdamW(
            tuned.weights,
            tuned.lr_factors,
            weight_decay=spec.weight_decay,
            max_norm=spec.max_grad_norm,
            process_group=processes,
        )

    def begin(self, start_from: Path | None) -> None:
        """Puts the state in place that training goes on from."""
        last = checkpoint.latest(self._checkpoints, self._spec)
        if last is None:
            if start_from is not None:
                load_start_adapter(self._tuned, start_from, self._spec)
            self._update.load_state(0, None)
            return
        if last.run_state.finished:
            self.standing = self._saved = last.run_state
            return
        _copy_into(self._tuned.state, last.state)
        self._update.load_state(
            last.run_state.step, OptimizerState(last.weights, last.first_moments, last.second_moments)
        )
        self.standing = self._saved = last.run_state

    def advance(self) -> TrainingProgress:
        """Takes a step, with the validation that is due after it; or that validation alone, after a pause there."""
        try:
            if not self.standing.pending:
                self.standing = self._step()
            if self.standing.pending:
                self.standing = self._validated()
        except (JobPaused, JobPreempted):
            self._save()
            raise
        done = self.standing
        if done.finished or done.step % self._spec.checkpoint_every == 0 or "valid_loss" in (done.figures or {}):
            self._save()
        return TrainingProgress(
            step=done.step,
            total_steps=self._spec.steps,
            trained_tokens=done.tokens,
            is_best=done.best_step == done.step,
            **(done.figures or {}),
        )

    def _step(self) -> RunState:
        spec, step = self._spec, self.standing.step
        chosen = choose_batch(len(self._train), spec.batch_size, step, spec.seed, epochs=spec.epochs is not None)
        batch = [self._train[index] for index in chosen]
        rate = learning_rate(spec, step)
        self._tuned.set_dropout(True)
        try:
            with seeded(self._model.device, spec.seed, step, *([self._processes.rank] if self._processes.rank else [])):
                loss, accuracy = self._over(batch, learning=True)
        finally:
            self._tuned.set_dropout(False)
        norm = self._update.step(rate) if math.isfinite(loss) else math.nan
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise self._diverged(f"loss {loss}, gradient norm {norm}, learning rate {rate:.3g}", chosen)
        self._tuned.after_step(step + 1)
        self._update.zero_grad()
        figures = {"loss": loss, "accuracy": accuracy, "learning_rate": rate, "grad_norm": norm}
        return replace(
            self.standing,
            step=step + 1,
            tokens=self.standing.tokens + sum(len(example.tokens) for example in sequences(batch)),
            figures=figures,
            pending=bool(self._valid) and self._validates(step + 1),
            finished=step + 1 == spec.steps and not self._valid,
        )

    def _validates(self, step: int) -> bool:
        every = self._spec.eval_every or self._spec.checkpoint_every
        return step % every == 0 or step == self._spec.steps

    @torch.no_grad()
    def _validated(self) -> RunState:
        now = self.standing
        loss, accuracy = self._over(self._valid, learning=False)
        if not math.isfinite(loss):
            raise self._diverged(f"validation loss {loss}", [])
        settled = now.step >= self._tuned.best_from_step
        better = settled and (now.best_loss is None or loss < now.best_loss)
        stale = 0 if better or not settled else now.stale + 1
        return replace(
            now,
            figures={**(now.figures or {}), "valid_loss": loss, "valid_accuracy": accuracy},
            pending=False,
            best_step=now.step if better else now.best_step,
            best_loss=loss if better else now.best_loss,
            stale=stale,
            finished=now.step == self._spec.steps or (self._spec.patience or math.inf) <= stale,
        )

    def _over(self, examples: Sequence[EncodedExample], *, learning: bool) -> tuple[float, float]:
        """Mean loss and accuracy over `examples`, of all processes; learning, the gradients of this one's share."""
        spec, us = self._spec, self._processes
        examples = sequences(examples)
        total = math.fsum(map(supervised_weight, examples))
        sums = torch.zeros(2, dtype=torch.float64, device=self._model.device)
        groups = group_for_passes(examples, self._limit, packing=spec.packing, multiple_of=us.size)
        shares = [(group, 1.0) for group in groups[us.rank :: us.size]]
        if self._update.collective and len(shares) < -(-len(groups) // us.size):
            shares.append((groups[0], 0.0))  # a pass that counts for nothing, beside the others' last
        with us.all_reduce_on_exit(sums):
            for number, (group, counts) in enumerate(shares, start=1):
                with us.all_reduce_on_exit(sums.new_zeros(0)) if self._update.collective else nullcontext():
                    self._check()
                loss, correct = loss_and_accuracy(self._tuned.model, self._model, group, total, packing=spec.packing)
                if learning:
                    self._update.backward(loss * counts, last=number == len(shares))
                sums += torch.stack([loss.detach(), correct]).double() * counts
            if learning and us.rank == 0 and (penalty := self._tuned.penalty()) is not None:
                self._update.backward(penalty, last=True)
        return sums[0].item(), sums[1].item()

    def _save(self) -> None:
        """Writes a checkpoint of the last whole step, unless there is one."""
        if self._saved == self.standing or (self._processes.rank and not self._update.collective):
            return
        masters = self._update.state()
        if self._processes.rank == 0:
            # From the end nothing goes on, so that its checkpoint needs no moments: a third of the bytes.
            content = CheckpointData(
                run_state=self.standing,
                weights=masters.weights,
                first_moments={} if self.standing.finished else masters.first_moments,
                second_moments={} if self.standing.finished else masters.second_moments,
                state=dict(self._tuned.state),
            )
            checkpoint.write(self._checkpoints, self._spec, content)
        self._saved = self.standing

    def _diverged(self, figures: str, chosen: Sequence[int]) -> TrainingDiverged:
        spec, step = self._spec, self.standing.step
        lines = [self._train[index].line or index + 1 for index in chosen]
        return TrainingDiverged(
            f"Training diverged at step {step + bool(chosen)} of {spec.steps}: {figures}"
            f"{'; its examples are ' + ', '.join(map(str, lines)) if lines else ''}. Submit the job again with a lower "
            f"learning rate (try {spec.learning_rate / 3:.2g}) or a longer warm-up. The last checkpoint before it is "
            f"of step {self._saved.step}.",
            examples=lines,
        )


@torch.no_grad()
def _copy_into(named: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in named.items():
        tensor.copy_(values[name])


def _check_supervised(examples: Sequence[EncodedExample], use: str) -> None:
    silent = [number for number, example in enumerate(examples, start=1) if not supervised_weight(example)]
    if silent or not examples:
        what = f"Example {silent[0]} of the {use} data has" if silent else f"The {use} data has no examples, and so"
        raise DatasetInvalid(
            f"{what} no token to learn: give every example a completion, and room for it within 'max_length'.",
            problems=[f"{use} example {number}: no completion token" for number in silent],
        )
