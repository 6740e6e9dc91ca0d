"""Decides whether a job fits, chooses what makes it fit, and finds similar jobs that fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

from loramill.errors import DoesNotFit
from loramill.settings import JobSettings
from loramill.sizing.anatomy import Anatomy
from loramill.sizing.devices import accelerator_bytes
from loramill.sizing.full_finetune import estimate_full
from loramill.sizing.memory import MemoryEstimate, estimate
from loramill.sizing.passes import Device, MemoryRow, largest_row
from loramill.sizing.targets import TrainedElements, trained_elements
from loramill.types import JobSpec, Quantization

#: Fields that sizing may choose if the submitter did not set them. None of them changes the result of training.
ADJUSTABLE = ("micro_tokens", "gradient_checkpointing", "offload")

#: Tokens per forward pass above which a GPU is hardly faster.
GPU_TOKENS = 4096

#: Tokens whose computation takes as long as the overhead of a forward pass: dequantizing the base (measured: +37% on
#: 512 tokens, +2% on 8,192), or only the calls.
_OVERHEAD_NF4, _OVERHEAD = 190, 16
_CHECKPOINTING = 4 / 3
_OFFLOAD = {"none": 1.0, "optimizer": 1.3, "all": 2.0}
_MAX_SHARERS = 16
_MAX_NEAREST = 4


@dataclass(frozen=True, slots=True)
class GpuPool:
    """The kind of device that a job runs on.

    Attributes:
        device: a GPU or a CPU.
        device_bytes: memory of one device for jobs.
        sharers: number of jobs that share a device equally.
    """

    device: Device
    device_bytes: int
    sharers: int = 1

    @classmethod
    def from_settings(cls, settings: JobSettings) -> GpuPool | None:
        """The pool of the settings; None if neither `device_bytes` nor a known `accelerator_type` is set."""
        if not settings.on_gpu:
            return None if settings.device_bytes is None else cls("cpu", settings.device_bytes)
        found = settings.device_bytes or accelerator_bytes(settings.accelerator_type)
        return None if found is None else cls("cuda", int(found * (settings.gpu_fraction or 1.0)), settings.per_gpu)

    @property
    def budget_bytes(self) -> int:
        """Memory for one job."""
        return self.device_bytes // self.sharers


@dataclass(frozen=True, slots=True)
class SizingRequest:
    """A job with its base, its data and the pool.

    Attributes:
        lengths: tokens of the examples; a pair has those of both answers.
        adjustable: fields of `ADJUSTABLE` that may be chosen.
        supervised_fraction: the largest fraction of a row's tokens with a loss.
        shared_prefixes: whether examples may begin with the same tokens.
    """

    spec: JobSpec
    base: Anatomy
    quantization: Quantization
    lengths: tuple[int, ...]
    pool: GpuPool
    adjustable: frozenset[str]
    supervised_fraction: float = 1.0
    shared_prefixes: bool = True


@dataclass(frozen=True, slots=True)
class SizingPlan:
    """A sized job: its spec with everything chosen, and its memory."""

    spec: JobSpec
    row: MemoryRow
    memory: MemoryEstimate
    pool: GpuPool

    @property
    def sharers(self) -> int:
        """Number of such jobs that fit one device together, at most 16."""
        return max(1, min(_MAX_SHARERS, self.pool.device_bytes // self.memory.bytes))

    @property
    def passes(self) -> int:
        """Number of forward passes per step; each has at least one example."""
        return min(self.spec.batch_size, -(-self.row.step_tokens // self.spec.micro_tokens))

    @property
    def explanation(self) -> str:
        """The plan in a sentence."""
        spec = self.spec
        how = ["gradient_checkpointing = true"] if spec.gradient_checkpointing else []
        how += [f"offload = {spec.offload}"] if spec.offload != "none" else []
        passes = (
            f"micro_tokens = {spec.micro_tokens} ({self.passes} passes per step, of up to {self.row.tokens:,} tokens)"
        )
        sharing = f"; {self.sharers} such jobs fit one device" if self.sharers > 1 else ""
        taken, budget = format_bytes(self.memory.bytes), format_bytes(self.pool.budget_bytes)
        return f"Fits: about {taken} of {budget} with {', '.join([passes, *how])}{sharing}."


def plan(request: SizingRequest) -> SizingPlan:
    """The fastest choice that fits.

    Raises:
        DoesNotFit: none fits; `nearest` lists the nearest jobs that fit.
        InvalidRequest: a target, layer or pattern matches nothing.
    """
    found = fastest_fit(request)
    if found is not None:
        return found
    smallest = min(candidate_plans(request), key=lambda plan: plan.memory.bytes)
    others = nearest_fits(request)
    share = "" if request.pool.sharers == 1 else f" (1/{request.pool.sharers} of a GPU)"
    advice = f" Nearest jobs that fit: {'; '.join(name for name, _ in others)}." if others else " Nothing near it fits."
    raise DoesNotFit(
        f"The job needs {format_bytes(smallest.memory.bytes)} of memory, but "
        f"{format_bytes(request.pool.budget_bytes)}{share} are available; the largest part is the "
        f"{max(smallest.memory.items, key=lambda item: item.bytes).name}.{advice}",
        nearest=[name for name, _ in others],
    )


def fastest_fit(request: SizingRequest) -> SizingPlan | None:
    """The fastest choice that fits, or None."""
    fit = [each for each in candidate_plans(request) if each.memory.bytes <= request.pool.budget_bytes]
    return min(fit, key=partial(relative_cost, request), default=None)


def candidate_plans(request: SizingRequest) -> Iterator[SizingPlan]:
    """A plan for each choice."""
    trained = None if request.spec.method == "full" else trained_elements(request.spec, request.base)
    for spec in candidate_specs(request):
        yield plan_as_is(request, spec, trained)


def plan_as_is(request: SizingRequest, spec: JobSpec, trained: TrainedElements | None = None) -> SizingPlan:
    """The plan of a spec without changes."""
    row = largest_row(spec, request.lengths, request.supervised_fraction, shared_prefixes=request.shared_prefixes)
    if spec.method == "full":
        needed = estimate_full(spec, request.base, row, request.pool.device)
    else:
        needed = estimate(spec, request.base, request.quantization, row, request.pool.device, trained=trained)
    return SizingPlan(spec, row, needed, request.pool)


def candidate_specs(request: SizingRequest) -> Iterator[JobSpec]:
    """Specs that differ from the request's only in adjustable fields."""
    spec, free = request.spec, request.adjustable
    tokens = _micro_tokens(request) if "micro_tokens" in free else [spec.micro_tokens]
    checkpointing = [False, True] if "gradient_checkpointing" in free else [spec.gradient_checkpointing]
    offloads = (
        list(_OFFLOAD)
        if "offload" in free and spec.method == "full" and request.pool.device == "cuda"
        else [spec.offload]
    )
    for offload in offloads:
        for recompute in checkpointing:
            for count in tokens:
                yield spec.model_copy(
                    update={"micro_tokens": count, "gradient_checkpointing": recompute, "offload": offload}
                )


def nearest_fits(request: SizingRequest) -> list[tuple[str, SizingRequest]]:
    """Similar requests that fit, at most 4, each with its description; the nearest first.

    The nearest have one change, where a number changes by at most a factor of 4; then two changes; then a number that
    changes by any factor; then everything at once.
    """
    pairs = [
        (f"{first} and {second}", both)
        for first, once in _switches(request)
        for second, both in [*_switches(once), *_numbers(once)]
    ]
    ways: Iterable[tuple[str, SizingRequest]] = chain(
        _switches(request), _numbers(request), pairs, _numbers(request, far=True), _everything(request)
    )
    found: dict[str, SizingRequest] = {}
    for description, changed in ways:
        parts = description.split(" and ")
        beyond = any(set(known.split(" and ")) <= set(parts) for known in found)
        if not beyond and fastest_fit(changed):
            found[description] = changed
        if len(found) == _MAX_NEAREST:
            break
    return list(found.items())


def format_bytes(size: float) -> str:
    """Bytes as text, such as "1.5 GB" or "40 MB"."""
    return f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def relative_cost(request: SizingRequest, plan: SizingPlan) -> float:
    """Time per token, relative to an infinitely long pass; of equal plans, the first is taken."""
    nf4 = request.quantization == "nf4" and request.pool.device == "cuda"
    calls = 1 + (_OVERHEAD_NF4 if nf4 else _OVERHEAD) / plan.row.tokens
    return calls * (_CHECKPOINTING if plan.spec.gradient_checkpointing else 1.0) * _OFFLOAD[plan.spec.offload]


def _micro_tokens(request: SizingRequest) -> list[int]:
    """The spec's number, its halves down to one example per pass, and on a GPU its doubles; it begins no lower than the
    default, since a nightly run continues from a spec that may have been sized for longer data."""
    start = max(request.spec.micro_tokens, JobSpec.model_fields["micro_tokens"].default)
    longest = min(request.spec.max_example_tokens, max(request.lengths, default=request.spec.max_example_tokens))
    halves = [
        start >> times for times in range(start.bit_length()) if (start >> max(0, times - 1)) > longest or not times
    ]
    last = [1] if halves[-1] > 1 else []
    doubles = [start << times for times in range(1, 16) if start << times <= GPU_TOKENS]
    return halves + last + (doubles if request.pool.device == "cuda" else [])


def _switches(request: SizingRequest) -> Iterator[tuple[str, SizingRequest]]:
    """Changes of options that take less memory."""
    spec = request.spec
    if not spec.gradient_checkpointing and "gradient_checkpointing" not in request.adjustable:
        yield "gradient_checkpointing = true", _with(request, gradient_checkpointing=True)
    if "micro_tokens" not in request.adjustable:
        yield "micro_tokens left out", replace(request, adjustable=request.adjustable | {"micro_tokens"})
    if spec.method == "full" and "offload" not in request.adjustable:
        yield "offload left out", replace(request, adjustable=request.adjustable | {"offload"})
    if spec.method == "full":
        yield 'method = "lora"', _with(request, method="lora", offload="none")
    quantizable = request.base.experts is None and request.quantization != "nf4"
    if quantizable and spec.method != "full" and request.pool.device == "cuda":
        yield 'a base in quantization = "nf4" (a setting of the pool)', replace(request, quantization="nf4")
    if request.pool.sharers > 1:
        yield "a whole GPU (per_gpu = 1)", replace(request, pool=replace(request.pool, sharers=1))


def _numbers(request: SizingRequest, *, far: bool = False) -> Iterator[tuple[str, SizingRequest]]:
    """Numbers reduced to the largest value that fits; `far` allows less than a quarter of the requested one."""
    spec = request.spec
    lowest = 1 if far else -(-spec.rank // 4)
    if spec.method != "full" and (rank := _largest(spec.rank, lowest, lambda value: _with(request, rank=value))):
        yield f"rank = {rank}", _with(request, rank=rank)
    length = min(spec.max_example_tokens, max(request.lengths, default=spec.max_example_tokens))
    lowest = 8 if far else max(8, -(-length // 4))
    if shorter := _largest(length, lowest, lambda value: _with(request, max_length=value)):
        yield f"max_length = {shorter}", _with(request, max_length=shorter)


def _everything(request: SizingRequest) -> Iterator[tuple[str, SizingRequest]]:
    """All changes of options at once, alone and with one reduced number."""
    changes: list[str] = []
    while switch := next(_switches(request), None):
        changes.append(switch[0])
        request = switch[1]
    if changes:
        yield " and ".join(changes), request
    for number, changed in _numbers(request, far=True):
        yield " and ".join([*changes, number]), changed


def _with(request: SizingRequest, **fields: Any) -> SizingRequest:
    return replace(request, spec=request.spec.model_copy(update=fields))


def _largest(below: int, lowest: int, change: Callable[[int], SizingRequest]) -> int | None:
    """The largest value in [lowest, below) that fits; None if `lowest` doesn't fit."""
    if lowest >= below or not fastest_fit(change(lowest)):
        return None
    low, high = lowest, below - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fastest_fit(change(middle)) else (low, middle - 1)
    return low
