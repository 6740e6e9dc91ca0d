"""The normal form of an adapter, and where in a base it acts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from loramill.errors import AdapterInvalid


@dataclass(frozen=True, slots=True)
class Site:
    """A linear of the base, or several fused ones: they read the same x [rows, d_in] and lie side by side in y.

    Attributes:
        d_in: columns of x.
        modules: names of the target modules, in the order of their columns in y.
        widths: d_out of each module; y has `sum(widths)` columns.
    """

    d_in: int
    modules: tuple[str, ...]
    widths: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Delta:
    """What an adapter does to one target module: y becomes `gain * (y + b @ (a @ x))`.

    Attributes:
        a: [r, d_in].
        b: [d_out, r], with the adapter's scale folded in.
        gain: [d_out], DoRA's magnitude over the norm of the merged weight's rows; None: 1.
    """

    a: torch.Tensor
    b: torch.Tensor
    gain: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class PackedModule:
    """One target module within a packed site.

    Attributes:
        columns: its columns of the site's y.
        ranks: its rows of the site's `a`.
        b: [r, d_out] float32, transposed, so that the expansion is a plain product.
        gain: [d_out] float32, or None.
    """

    columns: slice
    ranks: slice
    b: torch.Tensor
    gain: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class PackedSite:
    """An adapter's weights at one site: the shrink matrices of its modules as one, [d_in, sum of r] float32."""

    a: torch.Tensor
    modules: tuple[PackedModule, ...]

    @property
    def bytes(self) -> int:
        """Bytes of weights."""
        tensors = [self.a, *(m.b for m in self.modules), *(m.gain for m in self.modules if m.gain is not None)]
        return sum(tensor.nbytes for tensor in tensors)


#: An adapter as a slab holds it: an entry a site, None where it has no target there.
PackedAdapter = tuple[PackedSite | None, ...]


def pack(sites: Sequence[Site], deltas: Mapping[str, Delta]) -> PackedAdapter:
    """Lays an adapter out for a slab over `sites`; touches no shared state, so any thread may do it.

    Raises:
        AdapterInvalid: a delta names no module of `sites`, or its shapes don't fit the module.
    """
    known = {module for site in sites for module in site.modules}
    for module in deltas:
        if module not in known:
            raise AdapterInvalid(f"The adapter targets '{module}', which this base can't adapt.")
    return tuple(_pack_site(site, deltas) for site in sites)


def _pack_site(site: Site, deltas: Mapping[str, Delta]) -> PackedSite | None:
    shrinks: list[torch.Tensor] = []
    modules: list[PackedModule] = []
    column = rank = 0
    for module, width in zip(site.modules, site.widths, strict=True):
        delta = deltas.get(module)
        if delta is not None:
            _check(module, site.d_in, width, delta)
            r = delta.a.shape[0]
            gain = None if delta.gain is None else delta.gain.float().contiguous()
            b = delta.b.float().T.contiguous()
            modules.append(PackedModule(slice(column, column + width), slice(rank, rank + r), b, gain))
            shrinks.append(delta.a.float())
            rank += r
        column += width
    if not modules:
        return None
    return PackedSite(torch.cat(shrinks).T.contiguous(), tuple(modules))


def _check(module: str, d_in: int, d_out: int, delta: Delta) -> None:
    r = delta.a.shape[0]
    expected: list[tuple[str, torch.Tensor, tuple[int, ...]]] = [("A", delta.a, (r, d_in)), ("B", delta.b, (d_out, r))]
    if delta.gain is not None:
        expected.append(("gain", delta.gain, (d_out,)))
    for name, tensor, shape in expected:
        if r < 1 or tuple(tensor.shape) != shape:
            raise AdapterInvalid(
                f"{name} of '{module}' is {list(tensor.shape)}; this base needs {list(shape)} and a rank above 0."
            )
