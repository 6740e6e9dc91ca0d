"""Trains one adapter on a resident base model. Plain torch and PEFT: no Ray, no registry.

`TrainContext` is in `context.py`, and `export_adapter` in `export/adapter.py`:

    context = TrainContext(
        spec=spec, train_examples=examples, valid_examples=held_out, base_folder=base.folder, checkpoints=folder
    )
    for progress in train(model, context):  # may be left at any step; the next call resumes at the last checkpoint
        ...
    files = export_adapter(folder, spec, base="smollm2-135m")

The same spec and data give the same bits, also after a kill: order and dropout are functions of (seed, step), and a
checkpoint holds the weights, AdamW's moments and the method's state. (On another number of threads or processes, or
with other `micro_tokens`, the last bits may differ. On a GPU they differ from run to run unless the context is
`deterministic`.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial

import torch
from transformers import PreTrainedModel

from loramill.data.encoding import EncodedExample, EncodedPair, TrainingExample
from loramill.errors import DatasetInvalid, JobPaused, JobPreempted, TrainingDiverged
from loramill.jobs.train import checkpoint
from loramill.jobs.train.batching import choose_batch, group_units, supervised_weight
from loramill.jobs.train.checkpoint import CheckpointData, RunState
from loramill.jobs.train.context import TrainContext, TrainingProgress
from loramill.jobs.train.engine import Part, TrainingEngine, Work
from loramill.jobs.train.forward import Predictions, attention_window, configured_forward, lay_out, translate_oom
from loramill.jobs.train.lr_schedule import learning_rate
from loramill.jobs.train.methods import load_start_adapter
from loramill.jobs.train.methods.adapted_model import AdaptedModel
from loramill.jobs.train.methods.seeds import seed_of
from loramill.jobs.train.objectives.batch import BatchLoss
from loramill.jobs.train.objectives.losses import METRICS
from loramill.jobs.train.objectives.objective import objective_of
from loramill.jobs.train.objectives.preference import answer_log_probs
from loramill.jobs.train.optimizer import AdamW, Optimizer, OptimizerState


def train(model: PreTrainedModel, context: TrainContext) -> Generator[TrainingProgress, None, None]:
    """Trains from the last checkpoint, or from the start if there is none; yields after every step.

    Args:
        model: the frozen base, in any floating dtype. It is in use until the generator ends or is closed, and is then
            exactly as before.

    Raises:
        DatasetInvalid: an example has no supervised token.
        TrainingDiverged: a loss or gradient is not finite; the checkpoints stay.
        OutOfMemory: in a forward or backward pass; the message says what to change.
        InvalidRequest: the base lacks a target.
        AdapterInvalid: `start_from` does not fit.
        DiskFull: no space for a checkpoint.
        ArtifactCorrupt: a checkpoint can't be read.
    """
    with (
        open_run(model, context) as run,
        configured_forward(model, run.longest_row, masked=run.adapted.needs_mask, deterministic=context.deterministic),
    ):
        engine = TrainingEngine(model)
        while not run.state.finished:
            yield engine.complete(run.advance())


@contextmanager
def open_run(model: PreTrainedModel, context: TrainContext) -> Iterator[TrainingRun]:
    """Attaches a job's adapter to the base, at its last checkpoint or at its start. Several may be open at once.

    Raises:
        LoramillError: as `train`.
    """
    _check_supervised(context.train_examples, "training")
    if context.valid_examples:
        _check_supervised(context.valid_examples, "validation")
    longest = _longest_unit((*context.train_examples, *context.valid_examples))
    with (
        translate_oom(context.pass_tokens, longest),
        context.attach(model, context.spec, context.base_folder) as adapted,
    ):
        run = TrainingRun(model, adapted, context, longest + context.pass_tokens)
        run.resume()
        yield run


class TrainingRun:
    """A job in training, as a client of the training engine.

    Attributes:
        state: how far it is.
        longest_row: about how many tokens its longest row has.
    """

    def __init__(
        self, model: PreTrainedModel, adapted: AdaptedModel, context: TrainContext, longest_row: int = 0
    ) -> None:
        self.state = self._saved = RunState()
        self.adapted, self.longest_row = adapted, longest_row
        self._model, self._context, self._spec = model, context, context.spec
        self._objective = objective_of(context.spec, context.train_examples, context.valid_examples)
        self._optimizer = adapted.optimizer or AdamW(
            adapted.weights,
            adapted.lr_factors,
            weight_decay=self._spec.weight_decay,
            max_norm=self._spec.max_grad_norm,
            process_group=context.process_group,
        )

    def resume(self) -> None:
        """Loads the last checkpoint, or the adapter to start from."""
        last = checkpoint.latest(self._context.checkpoints, self._spec)
        if last is None:
            if self._context.start_from is not None:
                load_start_adapter(self.adapted, self._context.start_from, self._spec)
            self._optimizer.load_state(0, None)
            return
        self.state = self._saved = last.run_state
        if self.state.finished:
            return
        self._objective.reference = last.reference
        _copy_into(self.adapted.state, last.state)
        moments = OptimizerState(last.weights, last.first_moments, last.second_moments)
        self._optimizer.load_state(self.state.step, moments)

    def advance(self) -> Work[TrainingProgress]:
        """Takes a step and the validation that is due after it, or only that validation, after a pause before it."""
        try:
            yield from self._objective.prepare(self._score)
            if not self.state.pending:
                self.state = yield from self._step()
            if self.state.pending:
                self.state = yield from self._validate()
        except (JobPaused, JobPreempted):
            self._save()
            raise
        state, metrics = self.state, self.state.figures or {}
        if state.finished or state.step % self._spec.checkpoint_every == 0 or "valid_loss" in metrics:
            self._save()
        return TrainingProgress(
            step=state.step,
            total_steps=self._spec.steps,
            trained_tokens=state.tokens,
            is_best=state.best_step == state.step,
            rewards={name: value for name, value in metrics.items() if name.endswith(METRICS)},
            **{name: value for name, value in metrics.items() if not name.endswith(METRICS)},
        )

    def _step(self) -> Work[RunState]:
        spec, step, examples = self._spec, self.state.step, self._context.train_examples
        indices = choose_batch(len(examples), spec.batch_size, step, spec.seed, epochs=spec.epochs is not None)
        rate = learning_rate(spec, step)
        batch = yield from self._objective.batch("train", indices, self._score)
        figures = yield from self._figures(batch, training=True)
        loss = figures["loss"]
        norm = self._optimizer.step(rate) if math.isfinite(loss) else math.nan
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise self._diverged(f"loss {loss}, gradient norm {norm}, learning rate {rate:.3g}", indices)
        self.adapted.after_step(step + 1)
        self._optimizer.zero_grad()
        return replace(
            self.state,
            step=step + 1,
            tokens=self.state.tokens + sum(len(sequence.tokens) for unit in batch.units for sequence in unit),
            figures=figures | {"learning_rate": rate, "grad_norm": norm},
            pending=bool(self._context.valid_examples) and self._validates_after(step + 1),
            finished=step + 1 == spec.steps and not self._context.valid_examples,
        )

    def _validates_after(self, step: int) -> bool:
        return self._is_scheduled_validation(step) or step in self._context.validated_steps

    def _is_scheduled_validation(self, step: int) -> bool:
        """Whether the spec schedules a validation after this step; others do not count toward its patience."""
        interval = self._spec.eval_every or self._spec.checkpoint_every
        return step % interval == 0 or step == self._spec.steps

    def _validate(self) -> Work[RunState]:
        state = self.state
        indices = range(len(self._context.valid_examples))
        batch = yield from self._objective.batch("valid", indices, self._score)
        figures = yield from self._figures(batch, training=False)
        loss = figures["loss"]
        if not math.isfinite(loss):
            raise self._diverged(f"validation loss {loss}", [])
        may_be_best = state.step >= self.adapted.best_from_step
        better = may_be_best and (state.best_loss is None or loss < state.best_loss)
        stale = 0 if better or not may_be_best else state.stale + int(self._is_scheduled_validation(state.step))
        return replace(
            state,
            figures=(state.figures or {}) | {f"valid_{name}": value for name, value in figures.items()},
            pending=False,
            best_step=state.step if better else state.best_step,
            best_loss=loss if better else state.best_loss,
            stale=stale,
            finished=state.step == self._spec.steps or (self._spec.patience or math.inf) <= stale,
        )

    def _figures(self, batch: BatchLoss, *, training: bool) -> Work[dict[str, float]]:
        """Returns what the batch adds up, over the passes of all processes, without what is NaN besides the loss.

        Args:
            training: also compute the gradients of this process's passes.
        """
        group, optimizer = self._context.process_group, self._optimizer
        sums = torch.zeros(len(batch.names), dtype=torch.float64, device=self._model.device)
        passes = self._passes(batch.units)
        own = [(each, 1.0) for each in passes[group.rank :: group.size]]
        if optimizer.collective and len(own) < -(-len(passes) // group.size):
            own.append((passes[0], 0.0))  # a pass that counts for nothing, during the last pass of the others
        with group.all_reduce_on_exit(sums):
            for number, (indices, factor) in enumerate(own, start=1):
                with group.all_reduce_on_exit(sums.new_zeros(0)) if optimizer.collective else nullcontext():
                    self._context.raise_if_stopped()
                rows = [sequence for index in indices for sequence in batch.units[index]]
                part = self._part(rows, partial(batch.of_pass, indices), number if training else None)
                if optimizer.collective:
                    part = replace(part, backward=partial(_backward, optimizer, factor, number == len(own)))
                sums += factor * (yield part)
            if training and group.rank == 0 and (penalty := self.adapted.penalty()) is not None:
                optimizer.backward(penalty, last=True)
        figures = dict(zip(batch.names, sums.tolist(), strict=True))
        return {name: value for name, value in figures.items() if name not in METRICS or not math.isnan(value)}

    def _score(self, answers: Sequence[EncodedExample]) -> Work[torch.Tensor]:
        """Returns log-probabilities of answers by the adapter as it is, float64 [n] on the CPU, from all processes."""
        group = self._context.process_group
        scores = torch.zeros(len(answers), dtype=torch.float64, device=self._model.device)
        with group.all_reduce_on_exit(scores):
            for indices in self._passes([(answer,) for answer in answers])[group.rank :: group.size]:
                self._context.raise_if_stopped()
                rows = [answers[index] for index in indices]
                scores[indices] = yield self._part(rows, partial(_summed_log_probs, rows), None)
        return scores.cpu()

    def _passes(self, units: Sequence[Sequence[EncodedExample]]) -> list[list[int]]:
        return group_units(
            units,
            self._context.pass_tokens,
            packing=self._spec.packing,
            multiple_of=self._context.process_group.size,
            window=attention_window(self._model),
        )

    def _part(
        self,
        rows: Sequence[EncodedExample],
        loss: Callable[[Predictions], tuple[torch.Tensor, torch.Tensor]],
        number: int | None,
    ) -> Part:
        """Returns a part for training if it has a number within its step."""
        spec, rank, training = self._spec, self._context.process_group.rank, number is not None
        return Part(
            adapter=self.adapted,
            rows=lay_out(rows, self._model, packing=spec.packing),
            loss=loss,
            training=training,
            recompute=training and spec.gradient_checkpointing,
            dropout_key=seed_of(spec.seed, "dropout", self.state.step, rank, number) if training else None,
            raise_if_stopped=self._context.raise_if_stopped,
        )

    def _save(self) -> None:
        """Writes a checkpoint of the last complete step, unless there is one."""
        rank = self._context.process_group.rank
        if self._saved == self.state or (rank and not self._optimizer.collective):
            return
        optimizer_state = self._optimizer.state()
        if rank == 0:
            # No training resumes from the end: its checkpoint needs no moments, which saves two thirds of its bytes.
            finished = self.state.finished
            data = CheckpointData(
                run_state=self.state,
                weights=optimizer_state.weights,
                first_moments={} if finished else optimizer_state.first_moments,
                second_moments={} if finished else optimizer_state.second_moments,
                state={**self.adapted.state, **self.adapted.derived()},
                reference={} if finished else dict(self._objective.reference),
            )
            checkpoint.write(self._context.checkpoints, self._spec, data)
        self._saved = self.state

    def _diverged(self, values: str, indices: Sequence[int]) -> TrainingDiverged:
        spec, step = self._spec, self.state.step
        lines = [self._context.train_examples[index].line or index + 1 for index in indices]
        return TrainingDiverged(
            f"Training diverged at step {step + bool(indices)} of {spec.steps}: {values}"
            f"{'; its examples are ' + ', '.join(map(str, lines)) if lines else ''}. Submit the job again with a lower "
            f"learning rate (try {spec.learning_rate / 3:.2g}) or a longer warm-up. The last checkpoint before it is "
            f"of step {self._saved.step}.",
            examples=lines,
        )


def _backward(optimizer: Optimizer, factor: float, last: bool, loss: torch.Tensor) -> None:
    optimizer.backward(loss * factor, last=last)


@torch.no_grad()
def _copy_into(tensors: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        tensor.copy_(values[name])


def _longest_unit(examples: Sequence[TrainingExample]) -> int:
    """Tokens of the longest sequence, or of the longest pair, which is computed in one pass."""
    return max(
        sum(len(sequence.tokens) for sequence in example.sequences)
        if isinstance(example, EncodedPair)
        else max(len(sequence.tokens) for sequence in example.sequences)
        for example in examples
    )


def _summed_log_probs(rows: Sequence[EncodedExample], predictions: Predictions) -> tuple[torch.Tensor, torch.Tensor]:
    sums = answer_log_probs(rows, predictions)[0].sums
    return sums.sum(), sums


def _check_supervised(examples: Sequence[TrainingExample], use: str) -> None:
    unsupervised = [
        number
        for number, example in enumerate(examples, start=1)
        if not all(supervised_weight(sequence) for sequence in example.sequences)
    ]
    if unsupervised or not examples:
        subject = f"The {use} data has no examples, and so"
        if unsupervised:
            subject = f"Example {unsupervised[0]} of the {use} data has"
        raise DatasetInvalid(
            f"{subject} no supervised token: give every example a completion, and room for it within 'max_length'.",
            problems=[f"{use} example {number}: no completion token" for number in unsupervised],
        )
