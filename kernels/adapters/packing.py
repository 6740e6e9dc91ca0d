"""The normal form of an adapter, the sites of a base where it applies, and its byte layout in a slab."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from loramill.errors import AdapterInvalid
from loramill.kernels.memory import Allocator, aligned, host_memory


@dataclass(frozen=True, slots=True)
class Site:
    """A linear of the base, or several fused ones, which read the same x [rows, d_in] and have adjacent columns in y.

    Attributes:
        d_in: Number of columns of x.
        modules: Names of the target modules, in the order of their columns in y.
        widths: d_out of each module; y has `sum(widths)` columns.
        lookup: Whether the one module is an embedding: rows of x are one-hot over a vocabulary of `d_in`, given as
            tokens. Its adapters have the layout `LOOKUP` on every backend.
        head: Whether the one module computes the logits.
    """

    d_in: int
    modules: tuple[str, ...]
    widths: tuple[int, ...]
    lookup: bool = False
    head: bool = False


@dataclass(frozen=True, slots=True)
class Delta:
    """An adapter at one target module: y becomes `gain * (y + scale * b @ (a @ x))`.

    Attributes:
        a: [r, d_in], of any floating dtype, like b.
        b: [d_out, r]; a slab stores b times the scale.
        gain: [d_out], DoRA's magnitude divided by the norms of the merged weight's rows; None: 1.
        lookup: Whether the module is an embedding; then a is [r, vocabulary].
        scale: alpha divided by the rank or its square root.
    """

    a: torch.Tensor
    b: torch.Tensor
    gain: torch.Tensor | None = None
    lookup: bool = False
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Layout:
    """A backend's layout of an adapter's weights.

    Attributes:
        a: Converts a [r, d_in] to its stored form, in its dtype; called under `torch.vmap`, for many modules at once.
        b: Likewise for b [d_out, r].
        copy: Does both for matrices of the slab's own dtype or float32, written directly to their destination; None:
            not supported.
    """

    a: Callable[[torch.Tensor], torch.Tensor]
    b: Callable[[torch.Tensor], torch.Tensor]
    copy: Callable[[NDArray[np.void], torch.dtype], None] | None = None


#: What `Layout.copy` takes, one record per matrix: source and destination address, shape, whether it is a b, whether it
#: is float32, and its scale.
COPY_RECORD = np.dtype(
    [(name, np.int64) for name in ("from", "to", "rows", "columns", "of_b", "floats")] + [("scale", np.float64)]
)


#: Both matrices unchanged, row by row.
ROWS = Layout(torch.Tensor.contiguous, torch.Tensor.contiguous)

#: Both transposed: a token's row of a is read alone, and b rank by rank.
LOOKUP = Layout(lambda a: a.T.contiguous(), lambda b: b.T.contiguous())

#: Fields of a table's last axis: offsets in bytes of a, b and gain (-1: no gain), and the rank (0: not a target).
A, B, GAIN, RANK = range(4)


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """An adapter in the form that a slab takes: contiguous bytes.

    Attributes:
        data: uint8 [bytes]; each part starts at a cache line; a and b are in the slab's dtype, gains in float32. In
            int8, the float32 scales of a module's ranks directly precede its a.
        table: int64 [sites, modules of the widest site, 4]: the offsets of the parts.
    """

    data: torch.Tensor
    table: NDArray[np.int64]

    @property
    def bytes(self) -> int:
        """Number of bytes in a slab."""
        return self.data.numel()


def modules_per_site(sites: Sequence[Site]) -> int:
    """Number of modules of the widest site."""
    return max((len(site.modules) for site in sites), default=0)


def pack(
    sites: Sequence[Site],
    deltas: Mapping[str, Delta],
    layout: Layout,
    dtype: torch.dtype,
    allocate: Allocator = host_memory,
) -> PackedAdapter:
    """Packs an adapter for a slab over `sites`; touches no shared state, so any thread may call it.

    Args:
        sites: The base's sites.
        deltas: By module.
        layout: The backend's layout.
        dtype: Of a and b in the slab; int8 has one scale per rank and an error of about 1% of the delta.
        allocate: Returns the memory for the bytes.

    Raises:
        AdapterInvalid: A delta's module is not in `sites`, or its shapes do not match.
    """
    targets = _targets(sites, deltas)
    groups = _group_by_shape(targets, deltas)
    sizes: dict[str, tuple[int, ...]] = {}
    for names in groups:
        one = deltas[names[0]]
        shapes = (one.a.shape, one.b.shape, one.gain is not None, one.lookup)
        sizes |= dict.fromkeys(names, _sizes(layout, dtype, *shapes))
    table = np.zeros((len(sites), modules_per_site(sites), 4), dtype=np.int64)
    table[..., GAIN] = -1
    starts: dict[str, list[int]] = {}
    end = 0
    for name, (s, m, _) in targets.items():
        starts[name] = []
        for size in sizes[name]:
            starts[name].append(end)
            end += aligned(size)
        _, table[s, m, A], table[s, m, B], gain = starts[name]
        table[s, m, RANK] = len(deltas[name].a)
        if deltas[name].gain is not None:
            table[s, m, GAIN] = gain
    data = allocate(end)
    for names in groups:
        if layout.copy is not None and all(_is_plain(deltas[name], dtype) for name in names):
            layout.copy(_copy_records(names, deltas, starts, data.data_ptr()), dtype)
            continue
        # Shape by shape, so that the additional memory is soon free again.
        for part, rows in enumerate(_lay_out(names, deltas, layout, dtype)):
            _copy_rows(data.numpy(), [starts[name][part] for name in names], rows)
    return PackedAdapter(data, table)


def _is_plain(delta: Delta, dtype: torch.dtype) -> bool:
    """Whether a delta consists of two contiguous matrices, in the slab's dtype or float32."""
    plain = delta.a.dtype == delta.b.dtype and delta.a.dtype in (dtype, torch.float32) and dtype != torch.int8
    return plain and delta.gain is None and not delta.lookup and delta.a.is_contiguous() and delta.b.is_contiguous()


def _copy_records(
    names: list[str], deltas: Mapping[str, Delta], starts: Mapping[str, list[int]], address: int
) -> NDArray[np.void]:
    """The `COPY_RECORD`s of these modules, for data at an address."""
    records = []
    for name in names:
        delta, (_, a, b, _) = deltas[name], starts[name]
        floats = delta.a.dtype == torch.float32
        records.append((delta.a.data_ptr(), address + a, *delta.a.shape, 0, floats, 1.0))
        records.append((delta.b.data_ptr(), address + b, *delta.b.shape, 1, floats, delta.scale))
    return np.array(records, dtype=COPY_RECORD)


def _copy_rows(data: NDArray[np.uint8], starts: Sequence[int], parts: NDArray[np.uint8]) -> None:
    """Copies rows of bytes [n, size] to their offsets; all at once if these are equally far apart."""
    steps = np.diff(starts)
    if len(parts) > 1 and parts.shape[1] and (steps == steps[0]).all():
        rows = np.lib.stride_tricks.as_strided(data[starts[0] :], parts.shape, (int(steps[0]), 1))
        rows[:] = parts
        return
    for start, raw in zip(starts, parts, strict=True):
        data[start : start + raw.size] = raw


def _targets(sites: Sequence[Site], deltas: Mapping[str, Delta]) -> dict[str, tuple[int, int, Site]]:
    """Site index, module index and site of each delta, in the table's order."""
    targets = {
        name: (s, m, site) for s, site in enumerate(sites) for m, name in enumerate(site.modules) if name in deltas
    }
    for module in deltas:
        if module not in targets:
            raise AdapterInvalid(f"The adapter targets '{module}', which can't be adapted in this base.")
    for module, (_, m, site) in targets.items():
        _check(module, site, site.widths[m], deltas[module])
    return targets


def _group_by_shape(targets: Mapping[str, tuple[int, int, Site]], deltas: Mapping[str, Delta]) -> list[list[str]]:
    """Groups the modules by shape: for single modules, torch's calls would take longer than their work."""
    groups: dict[Hashable, list[str]] = {}
    for name in targets:
        delta = deltas[name]
        key = (delta.lookup, delta.a.shape, delta.b.shape, delta.a.dtype, delta.b.dtype, delta.gain is None)
        groups.setdefault(key, []).append(name)
    return list(groups.values())


@functools.lru_cache(maxsize=1024)
def _sizes(
    layout: Layout, dtype: torch.dtype, a: torch.Size, b: torch.Size, gain: bool, lookup: bool
) -> tuple[int, ...]:
    """The sizes in bytes of the parts that `_lay_out` returns, for matrices of these shapes."""
    one = Delta(torch.zeros(a), torch.zeros(b), torch.zeros(b[0]) if gain else None, lookup)
    return tuple(part.shape[1] for part in _lay_out(["one"], {"one": one}, layout, dtype))


def _lay_out(
    names: list[str], deltas: Mapping[str, Delta], layout: Layout, dtype: torch.dtype
) -> tuple[NDArray[np.uint8], ...]:
    """Bytes [names, size] of modules of equal shapes, in the order in which a kernel reads them.

    The parts are the scales (empty except in int8), a, b, and the gains (empty except in DoRA).
    """
    a, b = torch.stack([deltas[name].a for name in names]), torch.stack([deltas[name].b for name in names])
    b = _scaled(b, torch.tensor([deltas[name].scale for name in names]))
    nothing = np.empty((len(names), 0), dtype=np.uint8)
    scales, gains = nothing, nothing
    if dtype == torch.int8:
        a, b, scale = _quantize(a, b)
        scales = _bytes(scale)
    with_gain = [gain.float() for name in names if (gain := deltas[name].gain) is not None]
    if with_gain:
        gains = _bytes(torch.stack(with_gain))
    laid = LOOKUP if deltas[names[0]].lookup else layout
    of_a, of_b = (_bytes(torch.vmap(lay)(m.to(dtype))) for lay, m in ((laid.a, a), (laid.b, b)))
    return scales, of_a, of_b, gains


def _scaled(b: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Each of b [n, ...] times its scale: in place for powers of two, which lose no precision, else in float32."""
    if ((scales.frexp().mantissa == 0.5) & (scales >= 1)).all():
        return b.mul_(scales.to(b.dtype)[:, None, None])
    return b * scales[:, None, None]


def _bytes(tensors: torch.Tensor) -> NDArray[np.uint8]:
    """The bytes [n, bytes of one] of tensors [n, ...]."""
    raw: NDArray[np.uint8] = tensors.contiguous().flatten(1).view(torch.uint8).numpy()
    return raw


def _quantize(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantizes matrices to int8 with one scale per rank: b @ a is about b8 @ diag(scale) @ a8, for each of a stack.

    A rank with a NaN gets a NaN as its scale, so that the results show it.
    """
    a, b = a.float(), b.float()
    of_a, of_b = a.abs().amax(-1) / 127, b.abs().amax(-2) / 127
    a8, b8 = ((m / s).nan_to_num(0, 0, 0).round().to(torch.int8) for m, s in ((a, of_a[..., None]), (b, of_b[:, None])))
    return a8, b8, of_a * of_b


def scales_offset(a: int, rank: int) -> int:
    """Offset of an int8 module's scales, float32 [rank], given the offset of its a."""
    return a - aligned(4 * rank)


def _check(module: str, site: Site, d_out: int, delta: Delta) -> None:
    if delta.lookup != site.lookup or (delta.lookup and delta.gain is not None):
        raise AdapterInvalid(
            f"'{module}' is {'an embedding' if site.lookup else 'a linear'} in this base; the adapter is for "
            f"{'an embedding' if delta.lookup else 'a linear'} with{'' if delta.gain is not None else 'out'} a gain."
        )
    r = delta.a.shape[0]
    expected: list[tuple[str, torch.Tensor, tuple[int, ...]]] = [
        ("A", delta.a, (r, site.d_in)),
        ("B", delta.b, (d_out, r)),
    ]
    if delta.gain is not None:
        expected.append(("gain", delta.gain, (d_out,)))
    for name, tensor, shape in expected:
        if not 1 <= r <= MAX_RANK or tuple(tensor.shape) != shape:
            raise AdapterInvalid(
                f"{name} of '{module}' is {list(tensor.shape)}; this base needs {list(shape)} and a rank from 1 to "
                f"{MAX_RANK}."
            )


#: The kernels keep a row's product with a on the stack.
MAX_RANK = 256
