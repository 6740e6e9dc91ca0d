"""Paged attention of every backend against float64 attention over plain tensors, step by step as an engine does it."""

import random
from array import array
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loramill.errors import EngineFault
from loramill.kernels import KVSpan, Pages
from loramill.kernels.attention import capped
from loramill.kernels.memory import ALIGNMENT, HUGE_PAGE

from .conftest import BACKENDS, NATIVE, open_backend
from .oracle import TOLERANCE, assert_near

DTYPES = [torch.float32, torch.bfloat16]


def near(got, expected, dtype, tolerance=None):
    """Fails, with the worst elements, unless `got` is `expected` (float64) up to the dtype's rounding."""
    assert got.dtype == dtype
    assert_near(got, expected, tolerance or TOLERANCE[dtype])


@dataclass(eq=False)
class Sequence:
    """The oracle's copy of a sequence: float64 [kv_heads, positions, head_dim], as rounded."""

    keys: torch.Tensor
    values: torch.Tensor
    blocks: list[int] = field(default_factory=list)

    @property
    def length(self):
        return self.keys.shape[1]


class World:
    """A cache on a backend, poisoned with NaN, and sequences that share it."""

    def __init__(self, name, dtype, heads=6, kv_heads=2, head_dim=32, block_size=16, blocks=160, seed=None):
        self.backend, self.dtype = open_backend(name), dtype
        self.heads, self.kv_heads, self.head_dim, self.block_size = heads, kv_heads, head_dim, block_size
        self.random = torch.Generator().manual_seed(random.getrandbits(60) if seed is None else seed)
        self.kv = self.backend.new_kv(2, blocks, block_size, kv_heads, head_dim, dtype)
        for layer in self.kv:
            layer.keys.fill_(torch.nan)
            layer.values.fill_(torch.nan)
        self.free = torch.randperm(blocks, generator=self.random).tolist()
        self.scale = head_dim**-0.5

    def draw(self, *shape):
        return torch.randn(shape, generator=self.random).to(self.dtype)

    def sequence(self):
        return Sequence(*torch.zeros(2, self.kv_heads, 0, self.head_dim, dtype=torch.float64))

    def drop(self, sequence):
        self.free = sequence.blocks + self.free

    def pages(self, sequences, counts):
        spans = []
        for sequence, count in zip(sequences, counts, strict=True):
            while len(sequence.blocks) * self.block_size < sequence.length + count:
                sequence.blocks.append(self.free.pop(0))
            spans.append(KVSpan(sequence.length, count, tuple(sequence.blocks)))
        return Pages.of(spans, self.block_size)

    def qkv(self, rows):
        return self.draw(rows, (self.heads + 2 * self.kv_heads) * self.head_dim)

    def step(self, sequences, counts, window=None, qkv=None, cap=None):
        """Runs the backend; returns its output and the expected one."""
        q, qkv, pages = self.extend(sequences, counts, qkv)
        parts = zip(q.split(counts, dim=1), sequences, strict=True)
        expected = torch.cat([self.attend(part, sequence, window, cap) for part, sequence in parts])
        return self.backend.attention(qkv, self.heads, self.kv[1], pages, self.scale, window, cap), expected

    def extend(self, sequences, counts, qkv=None):
        """Writes keys and values; returns the oracle's queries, and those of the backend in qkv with their pages."""
        pages = self.pages(sequences, counts)
        qkv = self.qkv(pages.rows) if qkv is None else qkv
        angles = torch.from_numpy(pages.positions)[:, None] / 10000 ** torch.linspace(0, 1, self.head_dim // 2)
        cos, sin = angles.cos(), angles.sin()
        q, k, v = self.split(qkv.double())
        q, k = ((x * torch.cat((cos, cos), 1) + turned(x) * torch.cat((sin, sin), 1)) for x in (q, k))
        q, k = (x.to(self.dtype).double() for x in (q, k))
        for sequence, key, value in zip(sequences, k.split(counts, dim=1), v.split(counts, dim=1), strict=True):
            sequence.keys = torch.cat((sequence.keys, key), 1)
            sequence.values = torch.cat((sequence.values, value), 1)
        self.backend.rope_write(qkv, self.heads, cos, sin, self.kv[1], pages)
        return q, qkv, pages

    def split(self, qkv):
        parts = qkv.view(len(qkv), -1, self.head_dim).transpose(0, 1)
        return parts.split([self.heads, self.kv_heads, self.kv_heads])

    def attend(self, q, sequence, window, cap=None):
        mask = torch.ones(q.shape[1], sequence.length, dtype=torch.bool).tril(sequence.length - q.shape[1])
        if window is not None:
            mask &= mask.new_ones(mask.shape).triu(sequence.length - q.shape[1] - window + 1)
        k, v = (x.repeat_interleave(self.heads // self.kv_heads, 0) for x in (sequence.keys, sequence.values))
        scores = q @ k.mT * self.scale
        scores = scores if cap is None else cap * (scores / cap).tanh()
        return (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v).transpose(0, 1).flatten(1)


def turned(x):
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), -1)


# Before the step, and in it: decodes and prefills across blocks, and across the tiles of 64 positions.
LENGTHS = [(0, 1), (14, 1), (15, 1), (16, 1), (62, 1), (63, 1), (64, 1), (130, 1), (0, 37), (33, 20), (127, 3), (5, 70)]
SHAPES = [
    (9, 3, 64, 16),
    (4, 4, 32, 32),
    (6, 2, 48, 16),
    (8, 1, 80, 48),
    (10, 2, 96, 16),
    (4, 2, 128, 32),
    (3, 1, 256, 16),
]
SHAPES += [(50, 1, 34, 16), (2, 1, 250, 16)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", BACKENDS)
def test_a_step_of_decodes_and_prefills(name, shape, dtype):
    world = World(name, dtype, *shape)
    sequences = [world.sequence() for _ in LENGTHS]
    begun = [(sequence, before) for sequence, (before, _) in zip(sequences, LENGTHS, strict=True) if before]
    near(*world.step([sequence for sequence, _ in begun], [before for _, before in begun]), dtype)
    near(*world.step(sequences, [count for _, count in LENGTHS]), dtype)


@pytest.mark.parametrize("window", [1, 2, 16, 17, 63, 100, 1000])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BACKENDS)
def test_a_window(name, dtype, window):
    world = World(name, dtype)
    sequences = [world.sequence() for _ in range(3)]
    near(*world.step(sequences, [150, 20, 64], window), dtype)
    near(*world.step(sequences, [1, 40, 1], window), dtype)
    near(*world.step(sequences, [1, 1, 1], window), dtype)


@pytest.mark.parametrize("window", [None, 33])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BACKENDS)
def test_capped_scores(name, dtype, window, monkeypatch):
    # So few that the rows of a prompt are computed in parts.
    monkeypatch.setattr(capped, "SCORES", 6 * 100 * 40)
    world = World(name, dtype)
    sequences = [world.sequence() for _ in range(3)]
    for counts in ([90, 20, 64], [1, 60, 1], [1, 1, 1]):
        qkv = world.qkv(sum(counts))
        world.split(qkv)[0].mul_(8)  # scores beyond the cap
        near(*world.step(sequences, counts, window, qkv, cap=5.0), dtype)


@pytest.mark.parametrize("name", BACKENDS)
def test_capped_scores_of_any_size(name):
    world = World(name, torch.float32)
    qkv = world.qkv(140)
    world.split(qkv)[0].mul_(1000)  # exp(score) overflows
    near(*world.step([world.sequence()], [140], None, qkv, cap=2.0), torch.float32, tolerance=1e-4)


@pytest.mark.parametrize("name", BACKENDS)
@settings(max_examples=25)
@given(data=st.data(), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**32))
def test_any_steps_of_sequences_that_come_and_go(name, data, dtype, seed):
    heads, kv_heads = data.draw(st.sampled_from([(1, 1), (2, 2), (6, 2), (7, 1), (15, 1)]))
    head_dim, block_size = data.draw(st.sampled_from([32, 38, 64])), data.draw(st.sampled_from([16, 32, 48]))
    world = World(name, dtype, heads, kv_heads, head_dim, block_size, blocks=400, seed=seed)
    window = data.draw(st.none() | st.integers(1, 80))
    alive = []
    for _ in range(data.draw(st.integers(1, 5))):
        alive += [world.sequence() for _ in range(data.draw(st.integers(not alive, 3)))]
        chosen = [sequence for sequence in alive if data.draw(st.booleans())] or alive[:1]
        counts = [data.draw(st.just(1) | st.integers(1, 70)) for _ in chosen]
        near(*world.step(chosen, counts, window), dtype)
        # A finished sequence leaves stale content in its blocks, which the next one gets first.
        for sequence in [sequence for sequence in chosen if data.draw(st.integers(0, 3)) == 0]:
            alive.remove(sequence)
            world.drop(sequence)


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NATIVE)
def test_the_same_bits_in_any_chunks_and_any_batch(name, dtype, window):
    seed, rows = random.getrandbits(32), 200
    world = World(name, dtype, seed=seed)
    qkv = world.qkv(rows)
    whole = world.step([world.sequence()], [rows], window, qkv.clone())[0]
    cuts = sorted(random.sample(range(1, rows), 7))
    sequence, parts = world.sequence(), []
    for start, stop in zip([0, *cuts], [*cuts, rows], strict=True):
        other = world.sequence()
        both = torch.cat((world.qkv(9), qkv[start:stop]))
        parts.append(world.step([other, sequence], [9, stop - start], window, both)[0][9:])
    assert torch.equal(torch.cat(parts), whole), f"cuts {cuts}, seed {seed}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NATIVE)
def test_the_same_bits_on_several_threads(name, dtype):
    world = World(name, dtype, heads=9, kv_heads=3, head_dim=64)
    qkv, counts = world.qkv(720), [350, 1, 349, 20]
    alone = world.step([world.sequence() for _ in counts], counts, None, qkv.clone())[0]
    world.backend.set_threads(4)
    try:
        world.free = list(range(160))
        shared = world.step([world.sequence() for _ in counts], counts, None, qkv.clone())[0]
    finally:
        world.backend.set_threads(1)
    assert torch.equal(alone, shared)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("part", ["q", "k", "v"])
@pytest.mark.parametrize("name", BACKENDS)
def test_nan_stays_in_its_own_sequence_and_is_seen_there(name, part, dtype):
    outs = []
    for poison in (False, True):
        world = World(name, dtype, seed=7)
        sequences = [world.sequence() for _ in range(4)]
        counts = [20, 33, 1, 40]
        qkv = world.qkv(sum(counts))
        if poison:
            which = {"q": slice(0, 6), "k": slice(6, 8), "v": slice(8, 10)}[part]
            qkv.view(len(qkv), -1, world.head_dim)[20 + 30, which] = torch.nan  # row 30 of sequence 1
        first = world.step(sequences, counts, None, qkv)[0]
        second = world.step(sequences, [1, 1, 5, 1])[0]
        outs.append((first.split(counts), second.split([1, 1, 5, 1])))
    clean, broken = outs
    for step in (0, 1):
        for sequence in (0, 2, 3):
            assert torch.equal(clean[step][sequence], broken[step][sequence]), f"sequence {sequence}, step {step}"
    assert broken[0][1][30].isnan().all()
    if part != "q":  # keys and values are seen by all later rows too
        assert broken[0][1][30:].isnan().all()
        assert broken[1][1].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BACKENDS)
def test_rows_of_a_wider_tensor(name, dtype):
    world = World(name, dtype, heads=5, kv_heads=1, head_dim=34)
    wide = world.draw(30, 3 + 7 * 34 + 2)
    before = wide.clone()
    near(*world.step([world.sequence(), world.sequence()], [29, 1], None, wide[:, 3:-2]), dtype)
    kept = torch.cat((torch.arange(3), torch.arange(3 + 5 * 34, wide.shape[1])))
    assert torch.equal(wide[:, kept], before[:, kept])


@pytest.mark.parametrize("name", BACKENDS)
def test_scores_of_any_size(name):
    """exp overflows or vanishes unless the greatest score is subtracted first, across tiles too."""
    world = World(name, torch.float32)
    qkv = world.qkv(140)
    world.split(qkv)[0].mul_(40)  # scores up to some hundreds
    near(*world.step([world.sequence()], [140], None, qkv), torch.float32, tolerance=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BACKENDS)
def test_a_long_context(name, dtype):
    world = World(name, dtype, heads=3, kv_heads=1, head_dim=32, blocks=2100)
    sequence = world.sequence()
    world.extend([sequence], [32_761])
    # Sharp enough that a few positions dominate, wherever they are.
    qkv = world.qkv(3)
    world.split(qkv)[0].mul_(8)
    near(*world.step([sequence], [3], None, qkv), dtype, tolerance=1e-4 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("name", BACKENDS)
def test_no_rows(name):
    world = World(name, torch.bfloat16)
    got = world.backend.attention(world.qkv(0), world.heads, world.kv[1], Pages.of([], 16), 1.0)
    assert got.shape == (0, world.heads * world.head_dim)


def test_paging():
    spans = [
        KVSpan(0, 3, [4]),
        KVSpan(15, 1, array("i", [7])),
        KVSpan(16, 1, array("i", [2, 9, 5])),
        KVSpan(14, 4, [1, 0]),
    ]
    pages = Pages.of(spans, 16)
    assert pages.table.tolist() == [[0, 3, 0, 0], [3, 1, 15, 1], [4, 1, 16, 2], [5, 4, 14, 4]]
    assert pages.blocks.tolist() == [4, 7, 2, 9, 1, 0]
    assert pages.positions.tolist() == [0, 1, 2, 15, 16, 14, 15, 16, 17]
    assert pages.slots.tolist() == [64, 65, 66, 127, 144, 30, 31, 0, 1]
    assert (pages.rows, pages.end) == (9, 10)
    assert all(part.dtype == np.int32 for part in (pages.table, pages.blocks, pages.positions, pages.slots))
    on_cpu = pages.on(torch.device("cpu"))
    assert [part.tolist() for part in on_cpu] == [pages.positions.tolist(), pages.slots.tolist()]
    assert pages.on(torch.device("cpu")) is on_cpu


@pytest.mark.parametrize(
    "span", [KVSpan(0, 17, [1]), KVSpan(16, 1, [1]), KVSpan(0, 0, [1]), KVSpan(-1, 1, [1]), KVSpan(0, 1, [-1])], ids=str
)
def test_a_span_that_its_blocks_do_not_hold_is_refused(span):
    with pytest.raises(EngineFault, match=r"needs \d blocks, at least one row and no negative|is negative"):
        Pages.of([KVSpan(0, 1, [0]), span], 16)


@pytest.mark.parametrize("name", BACKENDS)
def test_pages_of_another_step_or_cache_are_refused(name):
    world = World(name, torch.bfloat16, blocks=4)
    cos = sin = torch.ones(2, 16)
    kv = world.kv[1]
    for pages in (
        Pages.of([KVSpan(0, 1, [0])], 16),
        Pages.of([KVSpan(0, 2, [0])], 32),
        Pages.of([KVSpan(0, 2, [4])], 16),
    ):
        with pytest.raises(EngineFault, match="paging has"):
            world.backend.rope_write(world.qkv(2), 6, cos, sin, kv, pages)
        with pytest.raises(EngineFault, match="paging has"):
            world.backend.attention(world.qkv(2), 6, kv, pages, 1.0)


@pytest.mark.parametrize(("block_size", "head_dim"), [(8, 64), (24, 64), (16, 33), (16, 258)])
def test_shapes_that_the_native_layout_cannot_hold_are_refused(native, block_size, head_dim):
    with pytest.raises(EngineFault, match="multiple of 16"):
        native.new_kv(1, 2, block_size, 1, head_dim, torch.bfloat16)


def test_no_two_parts_of_a_cache_reach_a_huge_page_in_the_same_step(native):
    layers = native.new_kv(30, 64 * 32, 16, 3, 64, torch.bfloat16)
    parts = [part for layer in layers for part in (layer.keys, layer.values)]
    assert len({part.data_ptr() % HUGE_PAGE for part in parts}) == 60
    assert all(part.data_ptr() % ALIGNMENT == 0 for part in parts)
