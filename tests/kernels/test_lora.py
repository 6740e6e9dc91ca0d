"""The reference against the contract's own words, over popularity, rows, ranks, odd sizes and dtypes."""

import random

import pytest
import torch

from loramill.errors import EngineFault
from loramill.kernels import Batch, Delta, Site, Slab, lora, pack

SITE = Site(d_in=37, modules=("q", "k", "v"), widths=(29, 5, 11))
RANKS = (1, 3, 8, 17, 64, 128)
ROWS = (1, 2, 7, 8, 33, 128, 511)
POPULARITY = ("none", "one", "distinct", "uniform", "zipf", "skewed")


def random_delta(seed: int, d_in: int, d_out: int) -> Delta:
    generator = torch.Generator().manual_seed(seed)
    r = RANKS[seed % len(RANKS)]
    gain = torch.rand(d_out, generator=generator) + 0.5 if seed % 3 == 0 else None
    return Delta(torch.randn(r, d_in, generator=generator), torch.randn(d_out, r, generator=generator), gain)


def random_adapter(seed: int) -> dict[str, Delta]:
    modules = [(m, w) for i, (m, w) in enumerate(zip(SITE.modules, SITE.widths, strict=True)) if (seed >> i) % 4 != 1]
    return {m: random_delta(seed * 7 + i, SITE.d_in, w) for i, (m, w) in enumerate(modules)}


def owners(popularity: str, rows: int) -> list[int | None]:
    draw = random.Random(rows)
    if popularity == "none":
        return [None] * rows
    if popularity == "one":
        return [0] * rows
    if popularity == "distinct":
        return [i % 12 for i in range(rows)]
    if popularity == "zipf":
        return sorted(min(11, int(1 / (draw.random() + 1e-9)) - 1) for _ in range(rows))
    if popularity == "skewed":
        return [None if i < rows // 2 else 3 if i < rows - 1 else 5 for i in range(rows)]
    return [draw.choice([None, *range(12)]) for _ in range(rows)]


def contract(x, y, adapters, owner):
    """The docstring of `lora`, a row and a module at a time."""
    expected = y.clone()
    for row, who in enumerate(owner):
        column = 0
        for module, width in zip(SITE.modules, SITE.widths, strict=True):
            delta = None if who is None else adapters[who].get(module)
            if delta is not None:
                part = slice(column, column + width)
                total = y[row, part].float() + x[row].float() @ delta.a.T @ delta.b.T
                expected[row, part] = (total if delta.gain is None else delta.gain * total).to(y.dtype)
            column += width
    return expected


@pytest.fixture(scope="module")
def loaded():
    slab = Slab([SITE], slots=12)
    adapters = [random_adapter(seed) for seed in range(12)]
    slots = []
    for adapter in adapters:
        slots.append(slab.allocate())
        slab.load(slots[-1], pack([SITE], adapter))
    return slab, adapters, slots


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("popularity", POPULARITY)
def test_the_reference_does_what_the_contract_says(loaded, popularity, rows, dtype):
    slab, adapters, slots = loaded
    owner = owners(popularity, rows)
    x, y = torch.randn(rows, SITE.d_in).to(dtype), torch.randn(rows, sum(SITE.widths)).to(dtype)
    expected = contract(x, y, adapters, owner)
    got = y.clone()
    lora(x, got, slab.views[0], Batch.of((None if who is None else slots[who], 1) for who in owner))
    tolerance = {"rtol": 1e-4, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(got, expected, **tolerance)
    alone = torch.tensor([who is None for who in owner])
    assert torch.equal(got[alone], y[alone])


def test_a_view_of_a_wider_output_is_written_in_place(loaded):
    slab, adapters, slots = loaded
    wide = torch.randn(4, 60)
    before = wide.clone()
    x = torch.randn(4, SITE.d_in)
    lora(x, wide[:, 7:52], slab.views[0], Batch.of([(slots[2], 4)]))
    torch.testing.assert_close(wide[:, 7:52], contract(x, before[:, 7:52], adapters, [2] * 4), rtol=1e-4, atol=1e-3)
    assert torch.equal(wide[:, :7], before[:, :7])
    assert torch.equal(wide[:, 52:], before[:, 52:])


def test_an_adapter_of_nan_touches_its_own_rows_alone():
    slab = Slab([SITE], slots=2)
    good, bad = slab.allocate(), slab.allocate()
    sizes = {"q": 29, "k": 5, "v": 11}
    nan = {m: Delta(torch.full((4, 37), torch.nan), torch.full((w, 4), torch.nan)) for m, w in sizes.items()}
    slab.load(good, pack([SITE], random_adapter(1)))
    slab.load(bad, pack([SITE], nan))
    x, y = torch.randn(5, 37), torch.randn(5, 45)
    with_bad, without = y.clone(), y.clone()
    lora(x, with_bad, slab.views[0], Batch.of([(good, 2), (bad, 1), (None, 2)]))
    lora(x, without, slab.views[0], Batch.of([(good, 2), (None, 3)]))
    assert with_bad[2].isnan().all()
    keep = [0, 1, 3, 4]
    assert torch.equal(with_bad[keep], without[keep])


def test_neighbours_of_one_adapter_are_one_run():
    slab = Slab([SITE], slots=2)
    one, two = slab.allocate(), slab.allocate()
    batch = Batch.of([(None, 3), (one, 2), (one, 1), (two, 4), (None, 1), (two, 0), (two, 1)])
    assert batch.rows == 12
    assert [(run.slot, run.rows.start, run.rows.stop) for run in batch.runs] == [
        (one, 3, 6),
        (two, 6, 10),
        (two, 11, 12),
    ]


def test_a_stale_handle_is_an_error_and_never_the_next_owner():
    slab = Slab([SITE], slots=1)
    old = slab.allocate()
    slab.load(old, pack([SITE], random_adapter(1)))
    slab.free(old)
    new = slab.allocate()
    assert new.index == old.index
    slab.load(new, pack([SITE], random_adapter(2)))
    x, y = torch.randn(1, 37), torch.zeros(1, 45)
    with pytest.raises(EngineFault, match="freed meanwhile"):
        lora(x, y, slab.views[0], Batch.of([(old, 1)]))
    assert not y.any()
    for use in (slab.free, slab.adapter, lambda slot: slab.load(slot, pack([SITE], {}))):
        with pytest.raises(EngineFault, match="freed meanwhile"):
            use(old)
    lora(x, y, slab.views[0], Batch.of([(new, 1)]))
    assert y.any()
