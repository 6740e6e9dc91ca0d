"""The base whose shapes are measured, and one step of its linears."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from loramill.kernels.adapter import Site
from loramill.kernels.backend import Backend, Weight
from loramill.kernels.batch import Batch
from loramill.kernels.slab import Slab


@dataclass(frozen=True, slots=True)
class Model:
    """A Llama-like decoder's dimensions."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int

    @property
    def sites(self) -> tuple[Site, ...]:
        """Where adapters act: q/k/v and gate/up are fused, four sites a layer for its seven projections."""
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
        sites: where they are.
        matrices: [sum of the site's widths, d_in] a site, as torch keeps them.
        weights: the same as the backend laid them out.
    """

    sites: tuple[Site, ...]
    matrices: tuple[torch.Tensor, ...]
    weights: tuple[Weight, ...]

    @classmethod
    def random(cls, kernels: Backend, model: Model, dtype: torch.dtype) -> Linears:
        """Weights of the size that trained ones have."""
        sites = model.sites
        matrices = tuple(torch.randn(sum(site.widths), site.d_in, dtype=dtype) * 0.02 for site in sites)
        return cls(sites, matrices, tuple(kernels.pack(matrix) for matrix in matrices))

    @property
    def parameters(self) -> int:
        """Of all matrices; a row costs two floating-point operations each."""
        return sum(matrix.numel() for matrix in self.matrices)

    @property
    def bytes(self) -> int:
        """That a step reads."""
        return sum(matrix.nbytes for matrix in self.matrices)

    def inputs(self, rows: int) -> list[torch.Tensor]:
        """An x [rows, d_in] for each site; sites of equal d_in share one, as a decoder's fit into the cache, too."""
        drawn = {site.d_in: torch.randn(rows, site.d_in, dtype=self.matrices[0].dtype) for site in self.sites}
        return [drawn[site.d_in] for site in self.sites]


def base_step(kernels: Backend, linears: Linears, rows: int) -> Callable[[], None]:
    """One pass of `rows` rows without adapters through all the linears."""
    dtype = linears.matrices[0].dtype
    nobody = Slab(linears.sites, slots=0, size=0, dtype=dtype, layout=kernels.layout)
    return step(kernels, linears, linears.inputs(rows), nobody, Batch.of([(None, rows)]))


def step(
    kernels: Backend, linears: Linears, inputs: list[torch.Tensor], slab: Slab, batch: Batch
) -> Callable[[], None]:
    """One pass through all the linears with the batch's adapters."""
    calls = list(zip(inputs, linears.weights, slab.views, strict=True))

    def run() -> None:
        for x, weight, site in calls:
            kernels.adapted_linear(x, weight, site, batch)

    return run
