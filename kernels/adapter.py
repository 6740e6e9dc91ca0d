"""The normal form of an adapter, where in a base it acts, and how its bytes lie in a slab."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from loramill.errors import AdapterInvalid
from loramill.kernels.memory import aligned


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
class Layout:
    """How a backend wants the weights to lie.

    Attributes:
        a, b: turn a [r, d_in] and b [d_out, r] into what is stored, in their dtype.
    """

    a: Callable[[torch.Tensor], torch.Tensor]
    b: Callable[[torch.Tensor], torch.Tensor]


#: Both matrices as they are, row by row.
ROWS = Layout(torch.Tensor.contiguous, torch.Tensor.contiguous)

#: Fields of a table's last axis: bytes from the start to a, b and gain (-1: no gain), and the rank (0: no target).
A, B, GAIN, RANK = range(4)


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """An adapter as a slab takes it: one run of bytes.

    Attributes:
        data: uint8 [bytes]; each part begins on a cache line; a and b in the slab's dtype, gains in float32. In int8
            the scales of a module's ranks, float32, lie just before its a.
        table: int64 [sites, modules of the widest site, 4]: where what lies.
    """

    data: torch.Tensor
    table: NDArray[np.int64]

    @property
    def bytes(self) -> int:
        """Bytes that it takes up in a slab."""
        return self.data.numel()


def modules_per_site(sites: Sequence[Site]) -> int:
    """Modules of the widest site."""
    return max((len(site.modules) for site in sites), default=0)


def pack(sites: Sequence[Site], deltas: Mapping[str, Delta], layout: Layout, dtype: torch.dtype) -> PackedAdapter:
    """Lays an adapter out for a slab over `sites`; touches no shared state, so any thread may do it.

    Args:
        sites: of the base.
        deltas: by module.
        layout: the backend's.
        dtype: of a and b in the slab; int8 comes with a scale a rank, and errs by about 1% of the delta.

    Raises:
        AdapterInvalid: a delta names no module of `sites`, or its shapes don't fit the module.
    """
    known = {module for site in sites for module in site.modules}
    for module in deltas:
        if module not in known:
            raise AdapterInvalid(f"The adapter targets '{module}', which this base can't adapt.")
    table = np.zeros((len(sites), modules_per_site(sites), 4), dtype=np.int64)
    table[..., GAIN] = -1
    parts: list[torch.Tensor] = []
    end = 0

    def place(tensor: torch.Tensor) -> int:
        nonlocal end
        raw = tensor.reshape(-1).view(torch.uint8)
        start, end = end, end + aligned(raw.numel())
        parts.extend((raw, raw.new_zeros(end - start - raw.numel())))
        return start

    for s, site in enumerate(sites):
        for m, (name, width) in enumerate(zip(site.modules, site.widths, strict=True)):
            if name not in deltas:
                continue
            delta = deltas[name]
            _check(name, site.d_in, width, delta)
            a, b = delta.a.to(dtype), delta.b.to(dtype)
            if dtype == torch.int8:
                a, b, scale = _quantize(delta)
                place(scale)
            # In the order in which a kernel reads them.
            table[s, m] = place(layout.a(a)), place(layout.b(b)), -1, len(a)
            if delta.gain is not None:
                table[s, m, GAIN] = place(delta.gain.float().contiguous())
    return PackedAdapter(torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8), table)


def _quantize(delta: Delta) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Matrices of int8 with one scale a rank: b @ a is about b8 @ diag(scale) @ a8.

    A rank with a value that is no number gets a scale that is none: what it touches must show it.
    """
    a, b = delta.a.float(), delta.b.float()
    of_a, of_b = a.abs().amax(1) / 127, b.abs().amax(0) / 127
    a8, b8 = ((m / s).nan_to_num(0, 0, 0).round().to(torch.int8) for m, s in ((a, of_a[:, None]), (b, of_b)))
    return a8, b8, of_a * of_b


def scales_before(a: int, rank: int) -> int:
    """Where the scales [rank] float32 of an int8 module begin whose matrix a begins at byte `a`."""
    return a - aligned(4 * rank)


def _check(module: str, d_in: int, d_out: int, delta: Delta) -> None:
    r = delta.a.shape[0]
    expected: list[tuple[str, torch.Tensor, tuple[int, ...]]] = [("A", delta.a, (r, d_in)), ("B", delta.b, (d_out, r))]
    if delta.gain is not None:
        expected.append(("gain", delta.gain, (d_out,)))
    for name, tensor, shape in expected:
        if not 1 <= r <= MAX_RANK or tuple(tensor.shape) != shape:
            raise AdapterInvalid(
                f"{name} of '{module}' is {list(tensor.shape)}; this base needs {list(shape)} and a rank from 1 to "
                f"{MAX_RANK}."
            )


#: The kernels keep a row's shrunk values on the stack.
MAX_RANK = 256
