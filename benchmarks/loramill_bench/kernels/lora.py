"""The time that adapters add to the base's linears, compared with other implementations and reading their bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from loramill.kernels.adapters.packing import Delta, Site, pack
from loramill.kernels.adapters.slab import Slab
from loramill.kernels.backend import Backend
from loramill.kernels.batch import Batch, Slot
from loramill.pipelines.compare.timing import Effort, interleaved, reader
from loramill_bench.kernels.model import Linears, step
from loramill_bench.results import Result


@dataclass(frozen=True, slots=True)
class Mix:
    """A step whose rows are divided equally among adapters of one rank, and its targets.

    Attributes:
        rows: Number of rows.
        adapters: Number of adapters.
        rank: Rank of the adapters.
        added_share: Maximum time that the adapters add, as a fraction of the base's step.
        loop_ratio: Minimum time of a loop over the adapters, relative to the added time; None: not measured.
        gather_ratio: The same for gathered weights and `torch.bmm`.
        read_share: Minimum speed at which the adapters' bytes are read, as a fraction of a pure read; None: no target.
    """

    rows: int
    adapters: int
    rank: int
    added_share: float
    loop_ratio: float | None = None
    gather_ratio: float | None = None
    read_share: float | None = None

    def name(self, dtype: torch.dtype) -> str:
        """Name with rows, adapters and rank, and the slab's dtype if it is not the base's."""
        return f"lora {self.rows}/{self.adapters}/{self.rank}{' int8' if dtype == torch.int8 else ''}"


MIXES = (
    Mix(8, 8, 16, added_share=0.25, loop_ratio=12, gather_ratio=4),
    Mix(32, 32, 16, added_share=0.40, loop_ratio=15, gather_ratio=3, read_share=0.65),
    Mix(32, 1, 16, added_share=0.08),
    Mix(8, 8, 64, added_share=0.80, read_share=0.65),
    Mix(512, 1, 16, added_share=0.07),
    Mix(512, 4, 16, added_share=0.09),
)
_SCALE = 2.0


@dataclass(frozen=True, slots=True)
class Stack:
    """Unscaled matrices of all adapters at one module: a [adapters, rank, d_in] and b [adapters, width, rank]."""

    a: torch.Tensor
    b: torch.Tensor


def measure(kernels: Backend, linears: Linears, mix: Mix, dtype: torch.dtype, effort: Effort) -> list[Result]:
    """Measures a mix in a slab of `dtype`, all variants in the same rounds; the baselines use the base's dtype."""
    name = mix.name(dtype)
    stacks = [random_stacks(site, mix, linears.matrices[0].dtype) for site in linears.sites]
    slab, slots = filled_slab(kernels, linears.sites, stacks, dtype)
    inputs = linears.inputs(mix.rows)
    owners = [row * mix.adapters // mix.rows for row in range(mix.rows)]
    variants: dict[str, Callable[[], object]] = {
        "adapted": step(kernels, linears, inputs, slab, Batch.of([(slots[owner], 1) for owner in owners])),
        "base": step(kernels, linears, inputs, slab, Batch.of([(None, mix.rows)])),
        "read": reader(slab.arena),
    }
    for baseline, target, how in (("loop", mix.loop_ratio, add_in_loop), ("gather", mix.gather_ratio, add_gathered)):
        if target is not None:
            variants[baseline] = _at_all_modules(how, inputs, stacks, owners)
    spent = interleaved(variants, effort)
    added = spent["adapted"] - spent["base"]
    floor = spent["read"] / spent["base"]
    results = [Result(f"{name}: added", added / spent["base"], "of base", mix.added_share, "lower", floor)]
    if mix.loop_ratio is not None:
        results.append(Result(f"{name}: PEFT's loop over added", spent["loop"] / added, "x", mix.loop_ratio, "higher"))
    if mix.gather_ratio is not None:
        results.append(
            Result(f"{name}: gather + bmm over added", spent["gather"] / added, "x", mix.gather_ratio, "higher")
        )
    if mix.read_share is not None:
        results.append(Result(f"{name}: slab", spent["read"] / added, "of read speed", mix.read_share, "higher"))
    return results


def random_stacks(site: Site, mix: Mix, dtype: torch.dtype) -> list[Stack]:
    """Random matrices for a site's modules."""
    return [
        Stack(
            torch.randn(mix.adapters, mix.rank, site.d_in, dtype=dtype) * 0.02,
            torch.randn(mix.adapters, width, mix.rank, dtype=dtype) * 0.02,
        )
        for width in site.widths
    ]


def filled_slab(
    kernels: Backend, sites: Sequence[Site], stacks: Sequence[Sequence[Stack]], dtype: torch.dtype
) -> tuple[Slab, list[Slot]]:
    """A slab that is filled with the adapters, and their slots."""
    modules = {
        name: stack
        for site, site_stacks in zip(sites, stacks, strict=True)
        for name, stack in zip(site.modules, site_stacks, strict=True)
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


def add_in_loop(x: torch.Tensor, result: torch.Tensor, stack: Stack, owners: list[int]) -> None:
    """Adds one adapter after another, like PEFT's `LoraLayer._mixed_batch_forward` (0.21) with `adapter_names`."""
    names = set(owners)
    parts = [[row for row, owner in enumerate(owners) if owner == name] for name in names]
    for name, rows in zip(names, parts, strict=True):
        result[rows] += F.linear(F.linear(x[rows], stack.a[name]), stack.b[name]) * _SCALE


def add_gathered(x: torch.Tensor, result: torch.Tensor, stack: Stack, owners: torch.Tensor) -> None:
    """Adds all adapters at once, with a copy of its adapter's matrices for each row."""
    a, b = stack.a.index_select(0, owners), stack.b.index_select(0, owners)
    result.add_(torch.bmm(b, torch.bmm(a, x[:, :, None]))[:, :, 0], alpha=_SCALE)


def _at_all_modules(
    add: Callable[..., None], inputs: list[torch.Tensor], stacks: list[list[Stack]], owners: list[int]
) -> Callable[[], None]:
    """A function that adds the adapters at all modules, each with an output of its own."""
    owner_index = owners if add is add_in_loop else torch.tensor(owners)
    calls = [
        (x, torch.zeros(len(x), stack.b.shape[1], dtype=x.dtype), stack)
        for x, site_stacks in zip(inputs, stacks, strict=True)
        for stack in site_stacks
    ]

    def run() -> None:
        for x, result, stack in calls:
            add(x, result, stack, owner_index)

    return run
