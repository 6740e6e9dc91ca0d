"""The shapes of a base model, and one step through its linears."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from loramill.kernels.adapters.packing import Site
from loramill.kernels.adapters.slab import Slab
from loramill.kernels.backend import Backend, Weight
from loramill.kernels.batch import Batch


@dataclass(frozen=True, slots=True)
class Model:
    """The dimensions of a Llama-like decoder."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites of adapters: q/k/v and gate/up are fused, so a layer has four sites for its seven projections."""
        q, kv, hidden, wide = self.heads * self.head_dim, self.kv_heads * self.head_dim, self.hidden, self.intermediate
        return tuple(
            Site(d_in, tuple(f"{layer}.{name}" for name in names), widths)
            for layer in range(self.layers)
            for d_in, names, widths in (
                (hidden, ("q", "k", "v"), (q, kv, kv)),
                (q, ("o",), (hidden,)),
                (hidden, ("gate", "up"), (wide, wide)),
                (wide, ("down",), (hidden,)),
            )
        )


SMOLLM2_135M = Model(layers=30, hidden=576, heads=9, kv_heads=3, head_dim=64, intermediate=1536)


@dataclass(frozen=True, slots=True)
class Linears:
    """All linears of a base, with random weights.

    Attributes:
        sites: The sites of the linears.
        matrices: [sum of the site's widths, d_in] per site, in torch's layout.
        weights: The same in the backend's layout.
    """

    sites: tuple[Site, ...]
    matrices: tuple[torch.Tensor, ...]
    weights: tuple[Weight, ...]

    @classmethod
    def random(cls, kernels: Backend, model: Model, dtype: torch.dtype) -> Linears:
        """Random weights with the standard deviation of trained ones."""
        sites = model.sites
        matrices = tuple(torch.randn(sum(site.widths), site.d_in, dtype=dtype) * 0.02 for site in sites)
        return cls(sites, matrices, tuple(kernels.pack(matrix) for matrix in matrices))

    @property
    def parameters(self) -> int:
        """Number of weights in all matrices; each costs two floating-point operations per row."""
        return sum(matrix.numel() for matrix in self.matrices)

    @property
    def bytes(self) -> int:
        """Bytes that a step reads."""
        return sum(matrix.nbytes for matrix in self.matrices)

    def inputs(self, rows: int) -> list[torch.Tensor]:
        """An x [rows, d_in] for each site; sites of equal d_in share one, so that inputs stay in the CPU's cache."""
        drawn = {site.d_in: torch.randn(rows, site.d_in, dtype=self.matrices[0].dtype) for site in self.sites}
        return [drawn[site.d_in] for site in self.sites]


def base_step(kernels: Backend, linears: Linears, rows: int) -> Callable[[], None]:
    """A function that passes `rows` rows without adapters through all linears."""
    dtype = linears.matrices[0].dtype
    empty = Slab(linears.sites, slots=0, size=0, dtype=dtype, layout=kernels.layout)
    return step(kernels, linears, linears.inputs(rows), empty, Batch.of([(None, rows)]))


def step(
    kernels: Backend, linears: Linears, inputs: list[torch.Tensor], slab: Slab, batch: Batch
) -> Callable[[], None]:
    """A function that passes a batch through all linears with its adapters."""
    calls = list(zip(inputs, linears.weights, slab.views, strict=True))

    def run() -> None:
        for x, weight, site in calls:
            kernels.adapted_linear(x, weight, site, batch)

    return run
