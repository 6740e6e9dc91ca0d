"""Helpers of the kernels' tests: random adapters, owners of rows, and comparisons that show the worst elements."""

import random

import torch

from loramill.kernels import Delta, Site, Slab, Slot
from loramill.kernels.adapters.packing import Layout

POPULARITY = ("none", "one", "distinct", "uniform", "zipf", "skewed")
ROWS = (1, 2, 7, 8, 33, 128, 511)
#: How far sums in float32 over rounded values may be off, relative to the largest element.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


def random_delta(r: int, d_in: int, d_out: int, *, gain: bool = False) -> Delta:
    """A module's adapter whose delta is about as large as the base's output."""
    scale = torch.rand(d_out) + 0.5 if gain else None
    return Delta(torch.randn(r, d_in) / d_in**0.5, torch.randn(d_out, r) / r**0.5, scale)


def random_adapter(site: Site, ranks: list[int], seed: int) -> dict[str, Delta]:
    """An adapter at one site: one rank per module drawn from `ranks`, some modules missing, some with a gain."""
    draw = random.Random(seed)
    modules = list(zip(site.modules, site.widths, strict=True))
    kept = [module for module in modules if draw.random() < 0.8] or [draw.choice(modules)]
    return {name: random_delta(draw.choice(ranks), site.d_in, width, gain=draw.random() < 0.3) for name, width in kept}


def owners(popularity: str, rows: int, adapters: int) -> list[int | None]:
    """The adapter of each row; None: the base alone."""
    draw = random.Random(rows)
    if popularity == "none":
        return [None] * rows
    if popularity == "one":
        return [0] * rows
    if popularity == "distinct":
        return [row % adapters for row in range(rows)]
    if popularity == "zipf":
        return sorted(min(adapters - 1, int(1 / (draw.random() + 1e-9)) - 1) for _ in range(rows))
    if popularity == "skewed":
        return [None if row < rows // 2 else 3 if row < rows - 1 else 5 for row in range(rows)]
    return [draw.choice([None, *range(adapters)]) for _ in range(rows)]


def filled_slab(
    sites: list[Site], adapters: list[dict[str, Delta]], dtype: torch.dtype, layout: Layout
) -> tuple[Slab, list[Slot]]:
    """A slab with the adapters in its slots, and one free slot."""
    size = 64 * 1024 + sum(
        64 * 1024 + 4 * 300 * (d.a.numel() + d.b.numel()) // 256 for a in adapters for d in a.values()
    )
    slab = Slab(sites, slots=len(adapters) + 1, size=size, dtype=dtype, layout=layout)
    slots = []
    for adapter in adapters:
        packed = slab.pack(adapter)
        slot = slab.allocate(packed.bytes)
        assert slot is not None
        slab.load(slot, packed)
        slots.append(slot)
    return slab, slots


def contract(x, y, site, adapters, owner, dtype):
    """The docstring of `lora`, one adapter and module at a time, in float64, with weights rounded to `dtype`."""
    expected = y.double()
    for index in {*owner} - {None}:
        rows = [row for row, its in enumerate(owner) if its == index]
        column = 0
        for module, width in zip(site.modules, site.widths, strict=True):
            if (delta := adapters[index].get(module)) is not None:
                part = slice(column, column + width)
                a, b = (matrix.to(dtype).double() for matrix in (delta.a, delta.b))
                total = expected[rows, part] + x[rows].double() @ a.T @ b.T
                expected[rows, part] = total if delta.gain is None else delta.gain.double() * total
            column += width
    return expected


def assert_near(got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Fails with the worst elements."""
    assert got.shape == expected.shape
    limit = tolerance * max(1.0, expected.abs().max().item()) if expected.numel() else 0.0
    error = (got.double() - expected.double()).abs().nan_to_num(nan=float("inf"))
    if error.numel() and error.max() > limit:
        worst = error.flatten().topk(min(5, error.numel())).indices
        lines = [
            f"{[int(i) for i in torch.unravel_index(at, error.shape)]}: {got.flatten()[at].item():.6g} "
            f"instead of {expected.flatten()[at].item():.6g}"
            for at in worst
        ]
        raise AssertionError(
            f"{int((error > limit).sum())} of {error.numel()} off by more than {limit:.3g}; " + "; ".join(lines)
        )
