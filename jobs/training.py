"""Trains one adapter on a resident base. Plain torch and PEFT: no Ray, no registry.

    progress = train(model, examples, held_out, spec, checkpoints=folder)
    for point in progress: ...              # may be left at any step; the next call goes on from the last checkpoint
    files = export(folder, spec, base="smollm2-135m")

The same spec and data give the same bits, also after a kill: order and dropout are functions of (seed, step), and a
checkpoint holds the weights and AdamW's moments. (On another number of threads the last bits may differ.)
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from loramill.chat import EncodedExample
from loramill.errors import ArtifactMissing, DatasetInvalid, TrainingDiverged
from loramill.jobs import checkpoint
from loramill.jobs.batches import choose, pack, split, supervised
from loramill.jobs.checkpoint import Checkpoint
from loramill.jobs.methods.lora import adapter_files, attached, read_weights, seeded, set_dropout, trainable
from loramill.types import JobSpec

#: Tokens of one forward pass: enough for full speed of a CPU's matrix products, few enough that attention,
#: which is quadratic in a packed row, stays cheap, and activations stay below a gigabyte.
ROW_TOKENS = 256

#: Up to this many tokens a row, plain matrix products beat torch's fused attention on a CPU (1.3x a step).
EAGER_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Progress:
    """One optimizer step done.

    Attributes:
        step: 1 to `steps`.
        loss: mean cross-entropy of the step's completion tokens, in nats, before its update.
        grad_norm: before clipping.
        tokens: trained on so far, prompts included.
        valid_loss: the same mean over the validation examples, after the update; at checkpoints, else None.
    """

    step: int
    steps: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    valid_loss: float | None


def train(
    model: PreTrainedModel,
    train: Sequence[EncodedExample],
    valid: Sequence[EncodedExample],
    spec: JobSpec,
    *,
    checkpoints: Path,
    start_from: Path | None = None,
) -> Generator[Progress, None, None]:
    """Trains as `spec` says, from the last checkpoint in `checkpoints` if there is one; yields after every step.

    Args:
        model: the frozen base, in any floating dtype. It is in use until the generator ends or is closed, and is then
            exactly as before.
        valid: held-out examples; may be empty.
        checkpoints: a folder of this job's own.
        start_from: a PEFT folder whose weights training begins from, for the same rank, targets and scale.

    Raises:
        DatasetInvalid: an example has no token to learn.
        TrainingDiverged: loss or gradient is not finite.
        AdapterInvalid: the base lacks a target, or `start_from` doesn't fit.
        DiskFull: no room for a checkpoint.
    """
    _check_supervised(train, "training")
    if valid:
        _check_supervised(valid, "validation")
    longest = max(len(example.tokens) for example in (*train, *valid))
    with attached(model, spec) as tuned, _attention(model, longest + ROW_TOKENS):
        parameters = trainable(tuned)
        optimizer = torch.optim.AdamW(parameters.values(), weight_decay=spec.weight_decay, fused=True)
        done, tokens = _begin(parameters, optimizer, checkpoint.latest(checkpoints, spec), spec, start_from)
        for step in range(done, spec.steps):
            batch = [train[index] for index in choose(len(train), spec.batch_size, step, spec.seed)]
            with seeded(model.device, spec.seed, step):
                loss = _accumulate(tuned, batch)
            norm = torch.nn.utils.clip_grad_norm_(parameters.values(), spec.max_grad_norm).item()
            rate = learning_rate(spec, step)
            _check_finite(spec, step, loss, norm, rate)
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
            tokens += sum(len(example.tokens) for example in batch)
            valid_loss = None
            if (step + 1) % spec.checkpoint_every == 0 or step + 1 == spec.steps:
                valid_loss = mean_loss(tuned, valid) if valid else None
                checkpoint.write(checkpoints, spec, _snapshot(step + 1, tokens, parameters, optimizer))
            yield Progress(step + 1, spec.steps, loss, rate, norm, tokens, valid_loss)


def export(checkpoints: Path, spec: JobSpec, *, base: str) -> dict[str, bytes]:
    """The finished adapter as PEFT's files, by name; `base` is the base's name on the wire.

    Raises:
        ArtifactMissing: the job of `spec` is not at its end in `checkpoints`.
    """
    last = checkpoint.latest(checkpoints, spec)
    if last is None or last.step < spec.steps:
        raise ArtifactMissing(
            f"{checkpoints} holds no whole checkpoint of step {spec.steps}, the job's last: train to the end first."
        )
    return adapter_files(spec, last.weights, base)


def learning_rate(spec: JobSpec, step: int) -> float:
    """Linear warm-up, then linear decay to zero; no step (from 0) is spent at zero itself."""
    warmup = round(spec.warmup_ratio * spec.steps)
    if step < warmup:
        return spec.learning_rate * (step + 1) / (warmup + 1)
    return spec.learning_rate * (spec.steps - step) / (spec.steps - warmup)


@torch.no_grad()
def mean_loss(tuned: PeftModel, examples: Sequence[EncodedExample]) -> float:
    """Mean cross-entropy of the examples' completion tokens, in nats."""
    total = sum(_loss(tuned, group).item() for group in split(examples, ROW_TOKENS))
    return total / sum(map(supervised, examples))


def _accumulate(tuned: PeftModel, batch: Sequence[EncodedExample]) -> float:
    """Adds the gradient of the batch's mean loss, a mean over its tokens however it is split; returns that loss."""
    count = sum(map(supervised, batch))
    total = 0.0
    set_dropout(tuned, on=True)
    for group in split(batch, ROW_TOKENS):
        loss = _loss(tuned, group)
        torch.autograd.backward(loss / count)
        total += loss.item()
    set_dropout(tuned, on=False)
    return total / count


def _loss(tuned: PeftModel, examples: Sequence[EncodedExample]) -> torch.Tensor:
    """Sum of the cross-entropies of the supervised tokens; logits are computed for these alone."""
    row = pack(examples)
    mask = torch.zeros(row.sees.shape, dtype=tuned.dtype).masked_fill(~row.sees, -math.inf)
    output = tuned(
        input_ids=row.tokens.to(tuned.device),
        position_ids=row.positions.to(tuned.device),
        attention_mask=mask[None, None].to(tuned.device),
        logits_to_keep=row.predicting.to(tuned.device),
        use_cache=False,
    )
    return cross_entropy(output.logits[0].float(), row.labels.to(tuned.device), reduction="sum")


@contextmanager
def _attention(model: PreTrainedModel, tokens: int) -> Iterator[None]:
    """Attends in the way that is fastest for rows of `tokens`."""
    before = model.config._attn_implementation
    if model.device.type == "cpu" and tokens <= EAGER_TOKENS:
        model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _begin(
    parameters: dict[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    last: Checkpoint | None,
    spec: JobSpec,
    start_from: Path | None,
) -> tuple[int, int]:
    """Puts the state in place that training goes on from; returns the steps done and the tokens trained on."""
    if last is not None:
        _fill(parameters, last.weights)
        for name, parameter in parameters.items():
            optimizer.state[parameter] = {
                "step": torch.tensor(float(last.step), device=parameter.device),
                "exp_avg": last.first_moments[name].to(parameter.device),
                "exp_avg_sq": last.second_moments[name].to(parameter.device),
            }
        return last.step, last.tokens
    if start_from is not None:
        _fill(parameters, read_weights(start_from, spec, parameters))
    return 0, 0


@torch.no_grad()
def _fill(parameters: dict[str, torch.nn.Parameter], weights: dict[str, torch.Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])


def _snapshot(
    step: int, tokens: int, parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer
) -> Checkpoint:
    state = {name: optimizer.state[parameter] for name, parameter in parameters.items()}
    return Checkpoint(
        step=step,
        tokens=tokens,
        weights={name: parameter.detach() for name, parameter in parameters.items()},
        first_moments={name: moments["exp_avg"] for name, moments in state.items()},
        second_moments={name: moments["exp_avg_sq"] for name, moments in state.items()},
    )


def _check_supervised(examples: Sequence[EncodedExample], use: str) -> None:
    silent = [number for number, example in enumerate(examples, start=1) if not supervised(example)]
    if silent or not examples:
        what = f"Example {silent[0]} of the {use} data has" if silent else f"The {use} data has no examples, and so"
        raise DatasetInvalid(
            f"{what} no token to learn: give every example a completion, and room for it within 'max_length'.",
            problems=[f"{use} example {number}: no completion token" for number in silent],
        )


def _check_finite(spec: JobSpec, step: int, loss: float, norm: float, rate: float) -> None:
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise TrainingDiverged(
            f"Training diverged at step {step + 1} of {spec.steps}: loss {loss}, gradient norm {norm}, learning rate "
            f"{rate:.3g}. Submit the job again with a lower learning rate (try {spec.learning_rate / 3:.2g}) "
            "or a longer warm-up."
        )
