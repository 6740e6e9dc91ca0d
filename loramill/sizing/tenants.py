"""The peak memory of jobs that train in one session, next to one base: what each adds.

    framework + base
    + for each job: its adapter in fp32, AdamW's two moments, and what its method keeps
    + for each job in the middle of a step: its gradients in fp32, and A and B in the base's dtype
    + one pass of at most `micro_tokens` tokens, of one job or of several: activations, logits, temporary tensors

The pass grows with its tokens and not with the number of jobs. Activations of the base, and the inputs of adapted
linears, exist once per token, whichever adapters its row meets; an adapter saves its own x A [tokens, r] for its rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from loramill.plural import counted
from loramill.sizing.anatomy import Anatomy
from loramill.sizing.memory import MemoryEstimate, base_weights, checkpoint_bytes, total
from loramill.sizing.passes import (
    EAGER_TOKENS,
    Device,
    MemoryItem,
    MemoryRow,
    cast_bytes,
    logits_of,
    needs_no_mask,
    one_layer,
    pass_scratch,
    token_bytes,
)
from loramill.sizing.targets import TrainedElements
from loramill.types import JobSpec, Quantization

#: Tokens of a pass that several jobs share, by type of device: enough for the products with the base's weights.
PASS_TOKENS: Mapping[str, int] = {"cpu": 1024, "cuda": 8192}


@dataclass(frozen=True, slots=True)
class SessionJob:
    """A job of a session.

    Attributes:
        trained: the result of `trained_elements`.
        row: its largest part of a pass.
    """

    spec: JobSpec
    trained: TrainedElements
    row: MemoryRow

    @property
    def accumulates(self) -> bool:
        """Whether its step takes several passes, so that it keeps gradients while others' passes run."""
        return self.row.step_tokens > self.row.tokens


def estimate_session(
    jobs: Sequence[SessionJob],
    base: Anatomy,
    quantization: Quantization,
    device: Device,
    dtype_bytes: int = 2,
    *,
    pass_tokens: int | None = None,
) -> MemoryEstimate:
    """The memory of jobs of any methods but "full" in one session.

    Args:
        jobs: at least one.
        pass_tokens: maximum tokens of a pass with several jobs; None: the largest `micro_tokens` of the jobs.
    """
    passing = largest_pass(jobs, pass_tokens or max(job.spec.micro_tokens for job in jobs))
    holding = [job for index, job in enumerate(jobs) if job.accumulates or index in passing]
    parts = [jobs[index] for index in passing]
    row, b = _pass_row(parts), dtype_bytes
    logits = logits_of(base, row, device, b)
    recomputed = any(job.spec.gradient_checkpointing for job in parts)
    layer = sum(one_layer(base, job.trained, _own_row(job, device), device, b) for job in parts)
    weights = sum(job.trained.weights for job in jobs)
    adapters = 4 * sum(job.trained.weights + job.trained.frozen for job in jobs)
    state = sum((8 + 4 * job.trained.extra_state) * job.trained.weights for job in jobs)
    gradients = 4 * sum(job.trained.gradients for job in holding)
    casts = sum(_cast_bytes(job, device, b) for job in holding)
    # A job writes its checkpoint after its step, while the others of its pass are in the middle of theirs.
    largest = max(jobs, key=lambda job: checkpoint_bytes(job.trained))
    own = 4 * largest.trained.gradients + _cast_bytes(largest, device, b) if largest in holding else 0
    return total(
        device,
        [
            base_weights(base, quantization, device, b),
            MemoryItem("adapters", adapters, f"{weights:,} weights of {counted(len(jobs), 'job')} in fp32"),
            MemoryItem("optimizer", state, "two moments of AdamW in fp32"),
        ],
        [
            MemoryItem("gradients", gradients, f"of {counted(len(holding), 'job')} in fp32"),
            MemoryItem("casts", casts, f"of {counted(len(holding), 'job')}: A and B in the base's dtype"),
            _activations(parts, base, device, b, recomputed=recomputed),
            logits,
            pass_scratch(
                base,
                row,
                device,
                logits,
                quantization,
                b,
                layer if recomputed else None,
                scales_rows=any(job.spec.method == "dora" for job in parts),
            ),
        ],
        checkpoint_bytes=checkpoint_bytes(largest.trained),
        layer_bytes=layer,
        hole_bytes=(2 * base.parameters if b == 4 else 0) + _torn_bytes(jobs, device, b),
        held_bytes=None if len(jobs) == 1 else gradients + casts - own,
    )


def largest_pass(jobs: Sequence[SessionJob], pass_tokens: int) -> list[int]:
    """The indices of the jobs whose parts fill a pass: the largest part, and the next ones that fit."""
    chosen: list[int] = []
    tokens = 0
    for index in sorted(range(len(jobs)), key=lambda index: -jobs[index].row.tokens):
        if not chosen or tokens + jobs[index].row.tokens <= pass_tokens:
            chosen.append(index)
            tokens += jobs[index].row.tokens
    return chosen


def _cast_bytes(job: SessionJob, device: Device, b: int) -> int:
    """A and B in the base's dtype, which the passes of a step share unless layers are recomputed."""
    return 0 if job.spec.gradient_checkpointing else cast_bytes(job.trained, device, b) * job.trained.cast


def _torn_bytes(jobs: Sequence[SessionJob], device: Device, b: int) -> int:
    """What malloc can't reuse because gradients and casts stay between passes, amid what activations leave.

    Six jobs of rank 16 take 1813 MB, 135 MB more than without it, and one takes none.
    """
    kept = [4 * job.trained.gradients + _cast_bytes(job, device, b) for job in jobs if job.accumulates]
    return sum(kept) - max(kept, default=0)


def _own_row(job: SessionJob, device: Device) -> MemoryRow:
    """The part of a job; a CPU computes the attention of each part in its own way."""
    return replace(job.row, eager=device == "cpu" and job.row.width <= EAGER_TOKENS)


def _pass_row(parts: Sequence[SessionJob]) -> MemoryRow:
    """The parts as one row. Attention is computed part by part, so that its largest part stands for its width."""
    tokens = sum(job.row.tokens for job in parts)
    return MemoryRow(
        tokens=tokens,
        width=-(-max(job.row.tokens * job.row.width for job in parts) // tokens),
        supervised_tokens=sum(job.row.supervised_tokens for job in parts),
        step_tokens=tokens,
        eager=any(job.row.width <= EAGER_TOKENS for job in parts),
    )


def _activations(parts: Sequence[SessionJob], base: Anatomy, device: Device, b: int, *, recomputed: bool) -> MemoryItem:
    """What the layers save: for the base and inputs per token of the pass, for an adapter per token of its part."""
    tokens = sum(job.row.tokens for job in parts)
    layers = base.layers - min(job.trained.first_layer for job in parts)
    kept = 0 if needs_no_mask(base, device, b) else sum(job.row.tokens * job.row.width * b for job in parts)
    how = ""
    if recomputed:
        kept += tokens * base.hidden * b * layers
        how = ", which are recomputed"
    else:
        attended = len(frozenset[int]().union(*(job.trained.attended_layers for job in parts)))
        inputs = frozenset[tuple[int, str, int]]().union(*(job.trained.inputs for job in parts))
        kept += tokens * b * sum(elements for _, _, elements in inputs)
        for job in parts:
            row, own = _own_row(job, device), job.trained.saved - sum(elements for _, _, elements in job.trained.inputs)
            of_base = attended * token_bytes(base, row, device, b, True)
            of_base += (layers - attended) * token_bytes(base, row, device, b, False)
            kept += row.tokens * (of_base + b * own)
    return MemoryItem(
        "activations", kept, f"of {tokens:,} tokens of {counted(len(parts), 'job')} in {layers} layers{how}"
    )
