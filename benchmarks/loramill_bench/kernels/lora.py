"""What adapters add to the base's linears, against what others do and against reading their bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from loramill.kernels.adapter import Delta, Site, pack
from loramill.kernels.backend import Backend
from loramill.kernels.batch import Batch, Slot
from loramill.kernels.slab import Slab
from loramill.pipelines.compare.timing import Effort, interleaved, reader
from loramill_bench.kernels.model import Linears, step
from loramill_bench.measure import Result


@dataclass(frozen=True, slots=True)
class Mix:
    """A step's rows, divided equally among so many adapters of one rank, and its targets.

    Attributes:
        rows, adapters, rank: of the step.
        added: share of the base step's time that they may add at most.
        loop: how many times slower a loop over the adapters must be at least; None: not measured.
        gather: the same for gathered weights and `torch.bmm`; None: not measured.
        reads: share of the pure read's speed that their bytes are read at, at least; None: no target.
    """

    rows: int
    adapters: int
    rank: int
    added: float
    loop: float | None = None
    gather: float | None = None
    reads: float | None = None

    def name(self, dtype: torch.dtype) -> str:
        """Rows, adapters and rank; how a slab keeps them, unless it is the base's own way."""
        return f"lora {self.rows}/{self.adapters}/{self.rank}{' int8' if dtype == torch.int8 else ''}"


MIXES = (
    Mix(8, 8, 16, added=0.25, loop=12, gather=4),
    Mix(32, 32, 16, added=0.40, loop=15, gather=3, reads=0.65),
    Mix(32, 1, 16, added=0.08),
    Mix(8, 8, 64, added=0.80, reads=0.65),
    Mix(512, 1, 16, added=0.07),
    Mix(512, 4, 16, added=0.09),
)
_SCALE = 2.0


@dataclass(frozen=True, slots=True)
class Stack:
    """One module's matrices of all adapters: a [adapters, rank, d_in] and b [adapters, width, rank], not scaled."""

    a: torch.Tensor
    b: torch.Tensor


def measure(kernels: Backend, linears: Linears, mix: Mix, dtype: torch.dtype, effort: Effort) -> list[Result]:
    """The mix's results in a slab of `dtype`; all that is compared ran in the same rounds, the rivals in the base's."""
    name = mix.name(dtype)
    stacks = [stack_of(site, mix, linears.matrices[0].dtype) for site in linears.sites]
    slab, slots = filled(kernels, linears.sites, stacks, dtype)
    inputs = linears.inputs(mix.rows)
    owners = [row * mix.adapters // mix.rows for row in range(mix.rows)]
    variants: dict[str, Callable[[], object]] = {
        "adapted": step(kernels, linears, inputs, slab, Batch.of([(slots[owner], 1) for owner in owners])),
        "base": step(kernels, linears, inputs, slab, Batch.of([(None, mix.rows)])),
        "read": reader(slab.arena),
    }
    for rival, target, how in (("loop", mix.loop, loop), ("gather", mix.gather, gather)):
        if target is not None:
            variants[rival] = _everywhere(how, inputs, stacks, owners)
    spent = interleaved(variants, effort)
    added = spent["adapted"] - spent["base"]
    floor = spent["read"] / spent["base"]
    results = [Result(f"{name}: added", added / spent["base"], "of base", mix.added, "lower", floor)]
    if mix.loop is not None:
        results.append(Result(f"{name}: PEFT's loop over added", spent["loop"] / added, "x", mix.loop, "higher"))
    if mix.gather is not None:
        results.append(Result(f"{name}: gather + bmm over added", spent["gather"] / added, "x", mix.gather, "higher"))
    if mix.reads is not None:
        results.append(Result(f"{name}: slab", spent["read"] / added, "of read speed", mix.reads, "higher"))
    return results


def stack_of(site: Site, mix: Mix, dtype: torch.dtype) -> list[Stack]:
    """Random matrices for a site's modules."""
    return [
        Stack(
            torch.randn(mix.adapters, mix.rank, site.d_in, dtype=dtype) * 0.02,
            torch.randn(mix.adapters, width, mix.rank, dtype=dtype) * 0.02,
        )
        for width in site.widths
    ]


def filled(
    kernels: Backend, sites: Sequence[Site], stacks: Sequence[Sequence[Stack]], dtype: torch.dtype
) -> tuple[Slab, list[Slot]]:
    """A slab that holds the adapters and nothing else."""
    modules = {
        name: stack
        for site, its in zip(sites, stacks, strict=True)
        for name, stack in zip(site.modules, its, strict=True)
    }
    count = len(stacks[0][0].a)
    packed = [
        pack(
            sites,
            {name: Delta(stack.a[i], stack.b[i] * _SCALE) for name, stack in modules.items()},
            kernels.layout,
            dtype,
        )
        for i in range(count)
    ]
    size = sum(adapter.bytes for adapter in packed)
    slab, slots = Slab(sites, slots=count, size=size, dtype=dtype, layout=kernels.layout), []
    for adapter in packed:
        slot = slab.allocate(adapter.bytes)
        assert slot is not None, "the slab was made to measure"
        slab.load(slot, adapter)
        slots.append(slot)
    return slab, slots


def loop(x: torch.Tensor, result: torch.Tensor, stack: Stack, owners: list[int]) -> None:
    """Adds one adapter after the other, as PEFT's `LoraLayer._mixed_batch_forward` (0.21) does with `adapter_names`."""
    names = set(owners)
    parts = [[row for row, owner in enumerate(owners) if owner == name] for name in names]
    for name, rows in zip(names, parts, strict=True):
        result[rows] += F.linear(F.linear(x[rows], stack.a[name]), stack.b[name]) * _SCALE


def gather(x: torch.Tensor, result: torch.Tensor, stack: Stack, owners: torch.Tensor) -> None:
    """Adds all adapters at once, after each row got a copy of its own's matrices."""
    a, b = stack.a.index_select(0, owners), stack.b.index_select(0, owners)
    result.add_(torch.bmm(b, torch.bmm(a, x[:, :, None]))[:, :, 0], alpha=_SCALE)


def _everywhere(
    how: Callable[..., None], inputs: list[torch.Tensor], stacks: list[list[Stack]], owners: list[int]
) -> Callable[[], None]:
    """One way to add the adapters, at all modules, each of which has an output of its own."""
    whose = owners if how is loop else torch.tensor(owners)
    calls = [
        (x, torch.zeros(len(x), stack.b.shape[1], dtype=x.dtype), stack)
        for x, its in zip(inputs, stacks, strict=True)
        for stack in its
    ]

    def run() -> None:
        for x, result, stack in calls:
            how(x, result, stack, whose)

    return run
