"""Paged decode attention by the Triton kernels against float64; test_triton_attention.py runs this interpreted.

bfloat16 is left out: the interpreter's `tl.dot` multiplies its bits as integers.
"""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loramill.errors import EngineFault
from loramill.kernels import KVSpan, LayerKV, Pages, torch_backend
from loramill.kernels.triton import StaticPages, attention
from loramill_bench.kernels import cuda_attention

from ..triton_interpreter import fast_interpreter, interpreter_ranges, nan_in_fresh_memory  # noqa: F401

host = importlib.import_module("loramill.kernels.triton.attention")

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3}
#: Within a tile, at its edges and beyond; in one split and in many.
LENGTHS = (1, 2, 15, 16, 17, 31, 33, 64, 65, 127, 129, 200, 256, 257, 411, 600)
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def few_splits():
    """The interpreter takes a millisecond per program, whether or not it has work."""
    with pytest.MonkeyPatch.context() as context:
        context.setattr(host, "SPLITS", (4, 4))
        yield


class World:
    """Sequences in blocks in any order; every position without an owner is NaN."""

    def __init__(self, lengths, dtype, *, group=3, kv_heads=2, head_dim=64, block_size=16, seed=0):
        self.group, self.kv_heads, self.head_dim, self.block_size = group, kv_heads, head_dim, block_size
        self.dtype, self.lengths = dtype, lengths
        self.heads, self.scale = group * kv_heads, head_dim**-0.5
        self.random = torch.Generator().manual_seed(seed)
        counts = [-(-length // block_size) for length in lengths]
        order = torch.randperm(sum(counts) + 3, generator=self.random)
        self.blocks = [part.tolist() for part in order[: sum(counts)].split(counts)]
        # The last block is the scratch block, as in a graph.
        total = sum(counts) + 4
        shape = (total, block_size, kv_heads, head_dim)
        self.kv = LayerKV(*(torch.full(shape, torch.nan, dtype=dtype) for _ in "kv"), block_size, kv_heads, head_dim)
        self.content = []
        for length, blocks in zip(lengths, self.blocks, strict=True):
            own = [self.draw(length, kv_heads, head_dim) for _ in "kv"]
            slots = torch.tensor([blocks[p // block_size] * block_size + p % block_size for p in range(length)])
            for part, values in zip((self.kv.keys, self.kv.values), own, strict=True):
                part.flatten(0, 1)[slots] = values
            self.content.append(own)

    @property
    def scratch(self):
        return len(self.kv.keys) - 1

    def draw(self, *shape):
        return torch.randn(shape, generator=self.random).to(self.dtype)

    def qkv(self, rows):
        # Rows of a wider tensor, whose keys and values must not be read.
        wide = torch.full((rows, 5 + (self.heads + 2 * self.kv_heads) * self.head_dim), torch.nan, dtype=self.dtype)
        wide[:, 5 : 5 + self.heads * self.head_dim] = self.draw(rows, self.heads * self.head_dim)
        return wide[:, 5:]

    def span(self, number, count=1):
        return KVSpan(self.lengths[number] - count, count, self.blocks[number])

    def pages(self, numbers):
        return Pages.of([self.span(number) for number in numbers], self.block_size)

    def expected(self, queries, number, window, cap=None):
        """Float64 [count, heads * head_dim]; the queries belong to the sequence's last positions."""
        k, v = (part.double().transpose(0, 1).repeat_interleave(self.group, 0) for part in self.content[number])
        q = queries[:, : self.heads * self.head_dim].double().view(len(queries), self.heads, self.head_dim)
        mask = torch.ones(len(queries), self.lengths[number], dtype=torch.bool)
        mask = mask.tril(self.lengths[number] - len(queries))
        if window is not None:
            mask &= mask.new_ones(mask.shape).triu(self.lengths[number] - len(queries) - window + 1)
        scores = q.transpose(0, 1) @ k.mT * self.scale
        scores = scores if cap is None else cap * (scores / cap).tanh()
        return (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v).transpose(0, 1).flatten(1)

    def check(self, got, qkv, numbers, window, cap=None):
        expected = torch.cat([self.expected(qkv[row : row + 1], n, window, cap) for row, n in enumerate(numbers)])
        assert got.dtype == self.dtype
        assert_near(got, expected)


def assert_near(got, expected):
    limit = TOLERANCE[got.dtype] * max(1.0, expected.abs().max().item())
    error = (got.double() - expected).abs().nan_to_num(nan=torch.inf).amax(dim=1)
    assert error.max() <= limit, f"rows off by {error.tolist()}, not {limit}"


def attend(world, numbers, window=None, cap=None):
    qkv = world.qkv(len(numbers))
    got = attention(qkv, world.heads, world.kv, world.pages(numbers), world.scale, window, cap)
    world.check(got, qkv, numbers, window, cap)


GRID = [(head_dim, group) for head_dim in (64, 80, 128) for group in (1, 3, 4, 8)]


@pytest.mark.parametrize(("head_dim", "group"), GRID)
def test_decodes_of_all_lengths(head_dim, group):
    index = GRID.index((head_dim, group))
    # In turn, so that each head dimension and each group has both dtypes.
    dtype = [*TOLERANCE][(index + index // 4) % 2]
    block_size = (16, 32)[(index + (dtype == torch.float16)) % 2]
    lengths = LENGTHS[(index + 2 * (dtype == torch.float16)) % 4 :: 4]
    world = World(lengths, dtype, group=group, kv_heads=1, head_dim=head_dim, block_size=block_size)
    attend(world, range(len(lengths)), window=(None, 40)[index // 2 % 2])


@pytest.mark.parametrize("splits", [(1, 1), (16, 16)])
@pytest.mark.parametrize("window", [None, 1, 100, 599, 5000])
def test_windows_and_splits(window, splits, monkeypatch):
    monkeypatch.setattr(host, "SPLITS", splits)
    attend(World((600, 1, 257), torch.float32, group=2, kv_heads=1, head_dim=32), [1, 0, 2], window)


@pytest.mark.parametrize(("dtype", "window"), [(torch.float32, None), (torch.float16, 40)])
def test_capped_scores(dtype, window):
    world = World((150, 1, 40), dtype, group=2, kv_heads=1, head_dim=32)
    world.scale *= 8  # scores beyond the cap
    attend(world, range(3), window, cap=3.0)
    world.scale *= 1000  # exp(score) overflows
    attend(world, range(3), window, cap=3.0)


@pytest.mark.parametrize(("group", "head_dim", "block_size"), [(17, 16, 16), (1, 8, 8), (5, 250, 48), (2, 34, 1)])
def test_shapes_that_are_not_powers_of_two(group, head_dim, block_size):
    attend(World((70, 5), torch.float32, group=group, head_dim=head_dim, block_size=block_size), [0, 1])


@settings(max_examples=8)
@given(data=st.data())
def test_any_decodes(data):
    lengths = data.draw(st.lists(st.integers(1, 150), min_size=1, max_size=4))
    world = World(
        lengths,
        data.draw(st.sampled_from(list(TOLERANCE))),
        group=data.draw(st.integers(1, 5)),
        kv_heads=data.draw(st.integers(1, 2)),
        head_dim=data.draw(st.sampled_from([16, 24, 64])),
        block_size=data.draw(st.sampled_from([16, 32, 48])),
    )
    # Rows may share a sequence's blocks, as the answers to one prompt do.
    numbers = data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=4))
    attend(world, numbers, data.draw(st.none() | st.integers(1, 160)))


def test_the_programs_of_a_step_fill_the_gpu_and_each_sequence_has_some(monkeypatch):
    monkeypatch.setattr(host, "SPLITS", (8, 64))
    for sequences in (1, 2, 4, 24, 128, 512):
        for kv_heads in (1, 3, 8):
            splits = host.splits_of(sequences, kv_heads)
            assert splits.bit_count() == 1
            assert 8 <= splits <= 64
            assert splits == 64 or sequences * kv_heads * splits >= host.PROGRAMS


def test_decodes_and_prefills_in_one_batch():
    world = World((40, 33, 90, 21), torch.float32)
    counts = [1, 7, 1, 21]
    pages = Pages.of([world.span(number, count) for number, count in enumerate(counts)], world.block_size)
    qkv = world.qkv(sum(counts))
    for window in (None, 12):
        got = attention(qkv, world.heads, world.kv, pages, world.scale, window)
        parts = zip(qkv.split(counts), range(4), strict=True)
        assert_near(got, torch.cat([world.expected(part, number, window) for part, number in parts]))


def test_steps_without_decodes_and_without_rows():
    world = World((40,), torch.float32)
    qkv = world.qkv(40)
    pages = Pages.of([world.span(0, 40)], world.block_size)
    assert_near(attention(qkv, world.heads, world.kv, pages, world.scale), world.expected(qkv, 0, None))
    assert attention(qkv[:0], world.heads, world.kv, Pages.of([], 16), world.scale).shape == (0, 6 * 64)


def test_the_same_call_gives_the_same_bits():
    world = World((300, 77), torch.float16, group=2, head_dim=16)
    qkv, pages = world.qkv(2), world.pages([0, 1])
    first, second = (attention(qkv, world.heads, world.kv, pages, world.scale) for _ in "12")
    assert torch.equal(first, second)


@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_nan_stays_in_its_own_sequence_and_is_seen_there(part):
    world = World((70, 100, 40), torch.float32, group=2, head_dim=16)
    qkv = world.qkv(3)
    before = attention(qkv, world.heads, world.kv, world.pages([0, 1, 2]), world.scale)
    if part == "q":
        qkv[1, : world.heads * world.head_dim] = torch.nan
    else:
        (world.kv.keys if part == "k" else world.kv.values)[world.blocks[1][2], 3] = torch.nan
    got = attention(qkv, world.heads, world.kv, world.pages([0, 1, 2]), world.scale)
    assert got[1].isnan().all()
    assert torch.equal(got[[0, 2]], before[[0, 2]])


def test_scores_of_any_size():
    """exp2 overflows or vanishes unless the greatest score is subtracted first, across tiles and splits too."""
    world = World((300,), torch.float32)
    qkv = world.qkv(1).mul_(60)
    got = attention(qkv, world.heads, world.kv, world.pages([0]), world.scale)
    torch.testing.assert_close(got.double(), world.expected(qkv, 0, None), rtol=1e-3, atol=1e-3)


def test_a_graph_replays_any_decodes_that_fit():
    """A capture records launches: the same tensors, grid and constants. Here the launches themselves are repeated."""
    world, rows = World((1, 17, 70, 33, 130), torch.float32, group=2, head_dim=16), 5
    static = StaticPages(rows=rows, blocks=24, block_size=16, scratch=world.scratch, device=CPU)
    steps = [[0, 1, 2], [4, 0], [3, 3, 2, 3, 4], [1]]
    addresses = [part.data_ptr() for part in static.pages.on(CPU)]
    for numbers in steps:
        static.refresh(world.pages(numbers))
        qkv = world.qkv(rows)
        got = attention(qkv, world.heads, world.kv, static.pages, world.scale)
        world.check(got[: len(numbers)], qkv, numbers, None)
        # Nothing was read for the other rows, nor written.
        assert got[len(numbers) :].isnan().all()
        positions, slots = static.pages.on(CPU)
        real = world.pages(numbers)
        assert positions.tolist() == [*real.positions, *[0] * (rows - len(numbers))]
        assert slots.tolist() == [*real.slots, *[world.scratch * 16] * (rows - len(numbers))]
    assert addresses == [part.data_ptr() for part in static.pages.on(CPU)]


def test_a_graph_writes_its_unused_rows_to_the_scratch_block():
    world = World((17, 30), torch.float32, head_dim=16)
    static = StaticPages(rows=4, blocks=4, block_size=16, scratch=world.scratch, device=CPU)
    static.refresh(world.pages([1]))
    before = world.kv.keys.clone()
    angles = torch.zeros(4, 8)
    qkv = world.draw(4, (world.heads + 4) * 16)
    torch_backend.rope_write(qkv, world.heads, angles.cos(), angles.sin(), world.kv, static.pages)
    changed = (world.kv.keys != before) & ~(world.kv.keys.isnan() & before.isnan())
    assert set(changed.nonzero()[:, 0].tolist()) == {world.blocks[1][1], world.scratch}
    assert set(changed[world.scratch].nonzero()[:, 0].tolist()) == {0}


def test_a_graph_refuses_what_it_was_not_sized_for():
    world = World((40, 20, 33), torch.float32)
    static = StaticPages(rows=2, blocks=4, block_size=16, scratch=world.scratch, device=CPU)
    several = Pages.of([world.span(1, 2)], 16)
    for pages in (world.pages([0, 1, 2]), world.pages([0, 2]), several):
        with pytest.raises(EngineFault, match="use the graph of a larger bucket"):
            static.refresh(pages)
    for pages in (Pages.of([KVSpan(0, 1, [world.scratch])], 16), Pages.of([KVSpan(0, 1, [0])], 32)):
        with pytest.raises(EngineFault, match="paging has"):
            static.refresh(pages)


def test_the_bench_checks_run_on_a_cpu_and_detect_an_error(monkeypatch):
    monkeypatch.setattr(cuda_attention, "CHECKED", (((17, 40), 3, 16, None), ((33,), 1, 16, 20)))
    checks = list(cuda_attention.check("cpu", dtypes=[torch.float32]))
    assert [check.runs.split(":")[0] for check in checks] == ["called", "replayed", "prefills"] * 2
    assert all(check.passed for check in checks), checks
    monkeypatch.setattr(cuda_attention.reference, "attention", lambda *_: torch.ones(1))
    assert not any(check.passed for check in cuda_attention.check("cpu", dtypes=[torch.float32]))
