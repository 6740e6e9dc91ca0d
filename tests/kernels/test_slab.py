"""The slab: slots, bytes, generations, eviction, loading while kernels run; selection of the backend."""

import threading
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loramill import kernels
from loramill.errors import AdapterInvalid, EngineFault, SettingsInvalid
from loramill.kernels import Batch, Delta, Site, Slab, reference
from loramill.kernels.adapters.packing import LOOKUP, ROWS, pack
from loramill.kernels.cpu.layout import PANELS
from loramill.kernels.memory import Extents, HostPool, Recycler, host_memory, populate

from .conftest import NATIVE, open_backend
from .oracle import random_delta

SITES = [Site(8, ("q", "k"), (8, 4)), Site(8, ("o",), (8,))]


def delta(r: int, d_in: int = 8, d_out: int = 8, *, gain: bool = False) -> Delta:
    return Delta(torch.ones(r, d_in), torch.ones(d_out, r), torch.ones(d_out) if gain else None)


def new_slab(slots: int = 2, size: int = 1 << 16, sites=SITES) -> Slab:
    return Slab(sites, slots=slots, size=size, dtype=torch.float32, layout=ROWS)


def put(slab: Slab, deltas):
    packed = slab.pack(deltas)
    slot = slab.allocate(packed.bytes)
    assert slot is not None
    slab.load(slot, packed)
    return slot


def test_a_full_slab_allocates_nothing_and_a_freed_slot_is_reused():
    slab = new_slab(slots=2)
    first, second = slab.allocate(64), slab.allocate(64)
    assert slab.free_slots == 0
    assert slab.allocate(64) is None
    slab.free(first)
    assert slab.allocate(64) not in (None, first, second)
    slab.check_integrity()


def test_bytes_are_counted_to_the_last():
    slab = new_slab(size=4096)
    slot = put(slab, {"q": delta(3), "k": delta(1, d_out=4), "o": delta(2, gain=True)})
    line = 64
    of_q, of_k, of_o = 2 * 2 * line, 2 * line, 3 * line  # a and b [3, 8] take two lines each, the others one
    assert slab.bytes == of_q + of_k + of_o
    assert slab.bytes + slab.free_bytes == slab.size == 4096
    slab.check_integrity()
    slab.free(slot)
    assert (slab.bytes, slab.free_bytes) == (0, 4096)


def test_a_module_takes_only_the_bytes_of_its_own_rank():
    slab = new_slab()
    small, large = (slab.pack({"q": delta(r)}).bytes for r in (8, 64))
    assert (small, large) == (2 * 8 * 8 * 4, 2 * 64 * 8 * 4)


NATIVE_LAYOUTS = [partial(lambda name: open_backend(name).layout, name) for name in NATIVE]


def packed_one_by_one(sites, deltas, layout, dtype):
    """The bytes and table of `pack`, one module at a time."""
    table = torch.zeros(len(sites), max(len(site.modules) for site in sites), 4, dtype=torch.int64)
    table[..., 2] = -1
    data: list[int] = []

    def append(tensor: torch.Tensor) -> int:
        start, raw = len(data), tensor.reshape(-1).view(torch.uint8).tolist()
        data.extend(raw + [0] * (-len(raw) % 64))
        return start

    for s, site in enumerate(sites):
        for m, name in enumerate(site.modules):
            if name in deltas:
                a, laid = deltas[name].a, LOOKUP if site.lookup else layout
                b = deltas[name].b.float() * deltas[name].scale
                if dtype == torch.int8:
                    of_a, of_b = a.float().abs().amax(1) / 127, b.float().abs().amax(0) / 127
                    append(of_a * of_b)
                    a, b = (a.float() / of_a[:, None]).round(), (b.float() / of_b).round()
                table[s, m, 0], table[s, m, 1] = append(laid.a(a.to(dtype))), append(laid.b(b.to(dtype)))
                table[s, m, 3] = len(a)
                if deltas[name].gain is not None:
                    table[s, m, 2] = append(deltas[name].gain)
    return torch.tensor(data, dtype=torch.uint8), table


@settings(max_examples=60)
@given(data=st.data(), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int8]))
@pytest.mark.parametrize("lay", [lambda: ROWS, lambda: PANELS, *NATIVE_LAYOUTS], ids=["rows", "panels", *NATIVE])
def test_modules_packed_together_have_the_bytes_of_modules_packed_alone(lay, data, dtype):
    layout = lay()
    widths = st.sampled_from([5, 32, 50])
    sites, deltas = [Site(23, ("embed",), (9,), lookup=True)], {}
    for s in range(data.draw(st.integers(1, 5))):
        modules = tuple(f"{s}.{m}" for m in range(data.draw(st.integers(1, 3))))
        site = Site(data.draw(st.sampled_from([8, 33])), modules, tuple(data.draw(widths) for _ in modules))
        sites.append(site)
        for name, width in zip(site.modules, site.widths, strict=True):
            rank = data.draw(st.sampled_from([0, 1, 3, 8]))
            if rank:
                whole = random_delta(rank, site.d_in, width, gain=data.draw(st.booleans()))
                kind = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
                scale = data.draw(st.sampled_from([1.0, 2.0, 0.5, 0.3]))
                deltas[name] = Delta(whole.a.to(kind), whole.b.to(kind), whole.gain, scale=scale)
    if data.draw(st.booleans()):
        deltas["embed"] = Delta(torch.randn(3, 23), torch.randn(9, 3), lookup=True)
    got = pack(sites, deltas, layout, dtype)
    expected, table = packed_one_by_one(sites, deltas, layout, dtype)
    assert torch.equal(got.data, expected)
    assert torch.equal(torch.from_numpy(got.table), table)


def test_as_few_adapters_as_possible_are_evicted():
    slab = new_slab(slots=4, size=1024)
    slots = [slab.allocate(256) for _ in range(4)]
    assert slab.evict(256, slots[1:]) == [slots[1]]
    assert slab.evict(100, slots[2:]) == []
    taken = slab.allocate(256)
    # Slots 0 and 2 are not neighbors: the third is needed to make them one piece.
    assert slab.evict(512, [slots[0], slots[2], taken]) == [slots[0], slots[2], taken]
    assert slab.allocate(512) is not None
    slab.check_integrity()


def test_nothing_is_evicted_if_it_would_not_help():
    slab = new_slab(slots=2, size=1024)
    first, second = slab.allocate(512), slab.allocate(512)
    assert slab.evict(1024, [first]) is None
    assert slab.evict(2048, [first, second]) is None
    slab.free(first)
    slab.free(second)
    assert slab.allocate(1024) is not None


@pytest.mark.parametrize("sites", [SITES[:1], [SITES[0], SITES[0], SITES[1]]])
def test_an_adapter_packed_for_other_sites_is_refused(sites):
    slab = new_slab()
    packed = new_slab(sites=sites).pack({"q": delta(2)})
    with pytest.raises(EngineFault, match="sites"):
        slab.load(slab.allocate(packed.bytes), packed)


def test_a_slot_takes_one_adapter_of_the_size_it_was_allocated_for():
    slab = new_slab()
    packed = slab.pack({"q": delta(2)})
    wrong = slab.allocate(packed.bytes + 64)
    with pytest.raises(EngineFault, match=r"bytes, not \d"):
        slab.load(wrong, packed)
    slot = put(slab, {"q": delta(2)})
    with pytest.raises(EngineFault, match="is loaded"):
        slab.load(slot, packed)


@pytest.mark.parametrize(
    ("deltas", "message"),
    [
        ({"z": delta(2)}, "targets 'z'"),
        ({"k": delta(2)}, r"B of 'k' is \[8, 2\].*needs \[4, 2\]"),
        ({"q": delta(2, d_in=7)}, r"A of 'q' is \[2, 7\]"),
        ({"q": delta(0)}, "rank from 1 to 256"),
        ({"q": delta(257)}, "rank from 1 to 256"),
        ({"q": Delta(torch.ones(2, 8), torch.ones(8, 2), torch.ones(3))}, "gain of 'q'"),
    ],
)
def test_deltas_that_do_not_fit_are_named(deltas, message):
    with pytest.raises(AdapterInvalid, match=message):
        new_slab().pack(deltas)


def test_stale_handles_are_errors_everywhere():
    slab = new_slab(slots=1)
    old = put(slab, {"q": delta(2)})
    slab.free(old)
    put(slab, {"q": delta(1)})
    packed = slab.pack({"q": delta(2)})
    for use in (slab.free, lambda slot: slab.load(slot, packed), lambda slot: slab.evict(1 << 16, [slot])):
        with pytest.raises(EngineFault, match="freed meanwhile"):
            use(old)
    with pytest.raises(EngineFault, match="freed meanwhile"):
        slab.check(Batch.of([(old, 1)]))


def test_a_slot_used_before_it_is_loaded_is_an_error():
    slab = new_slab()
    slot = slab.allocate(64)
    with pytest.raises(EngineFault, match="before an adapter was loaded"):
        slab.check(Batch.of([(slot, 1)]))


def test_neighbors_of_one_adapter_are_one_run():
    slab = new_slab()
    one, two = slab.allocate(0), slab.allocate(0)
    batch = Batch.of([(None, 3), (one, 2), (one, 1), (two, 4), (None, 1), (two, 0), (two, 1)])
    assert batch.rows == 12
    assert batch.segments.tolist() == [[one.index, 3, 6], [two.index, 6, 10], [two.index, 11, 12]]


@settings(max_examples=80)
@given(data=st.data(), slots=st.integers(1, 6), size=st.integers(0, 40).map(lambda n: 64 * n))
def test_invariants_hold_for_any_operations(data, slots, size):
    slab = new_slab(slots=slots, size=size)
    held = {}
    for _ in range(data.draw(st.integers(0, 30))):
        if held and data.draw(st.booleans()):
            slot = data.draw(st.sampled_from(sorted(held)))
            slab.free(slot)
            del held[slot]
        else:
            packed = slab.pack({"q": delta(data.draw(st.integers(1, 20)))})
            slot = slab.allocate(packed.bytes)
            if slot is None:
                order = data.draw(st.permutations(sorted(held)))
                for freed in slab.evict(packed.bytes, order) or []:
                    del held[freed]
                slot = slab.allocate(packed.bytes)
                assert (slot is not None) == (packed.bytes <= size)
            if slot is not None:
                slab.load(slot, packed)
                held[slot] = packed.bytes
        slab.check_integrity()
        assert slab.bytes == sum(held.values())
        assert slab.free_bytes == size - slab.bytes
        assert slab.free_slots == slots - len(held)


@pytest.mark.parametrize("broken", ["overlap", "lost", "pointer", "ghost"])
def test_broken_invariants_are_found(broken):
    slab = new_slab()
    slot = put(slab, {"q": delta(2)})
    allocation = slab._allocations[slot.index]
    if broken == "overlap":
        slab._extents.release(allocation.offset, 64)
    elif broken == "lost":
        allocation.size -= 64
    elif broken == "pointer":
        slab.table[0, slot.index, 0, 1] = slab.bytes + 64
    else:
        slab.table[:, 1 - slot.index] = slab.table[:, slot.index]
    with pytest.raises(EngineFault, match=r"taken twice|lost|points out|no owner"):
        slab.check_integrity()


def test_loading_while_kernels_run_changes_no_result(ops):
    site = Site(64, ("q",), (96,))
    adapters = [{"q": random_delta(r, 64, 96)} for r in (4, 16, 40)]
    slab = Slab([site], slots=2, size=1 << 17, dtype=torch.float32, layout=ops.layout)
    steady = put(slab, adapters[0])
    x = torch.randn(7, 64)
    alone = torch.zeros(7, 96)
    ops.lora(x, alone, slab.views[0], Batch.of([(steady, 7)]))
    packed = [slab.pack(adapter) for adapter in adapters]
    wanted, loaded = [], []
    stop = threading.Event()

    def load():
        while not stop.is_set():
            while wanted:
                slot, adapter = wanted.pop()
                slab.load(slot, adapter)
                loaded.append(slot)

    thread = threading.Thread(target=load)
    thread.start()
    try:
        for turn in range(60):
            adapter = packed[turn % 3]
            wanted.append((slab.allocate(adapter.bytes), adapter))
            while not loaded:
                y = torch.zeros(7, 96)
                ops.lora(x, y, slab.views[0], Batch.of([(steady, 7)]))
                assert torch.equal(y, alone)
            slab.free(loaded.pop())
    finally:
        stop.set()
        thread.join()
    slab.check_integrity()


def test_host_memory_is_zero_aligned_and_lazy():
    memory = host_memory(1 << 34)  # more than the machine has, which matters only once it is used
    assert memory.data_ptr() % 64 == 0
    assert not memory[:4096].any()
    assert not memory[-4096:].any()
    assert host_memory(0).numel() == 0


def test_parts_of_a_pool_are_adjacent_and_do_not_overlap():
    pool = HostPool(chunk=1 << 20)
    sizes = [100, 64, 1, 500_000, 600_000, 3 << 20, 10]
    parts = [pool.allocate(size).fill_(index) for index, size in enumerate(sizes)]
    assert [part.numel() for part in parts] == sizes
    assert all(part.data_ptr() % 64 == 0 for part in parts)
    assert all((part == index).all() for index, part in enumerate(parts))
    assert parts[1].data_ptr() == parts[0].data_ptr() + 128


def test_released_extents_are_merged():
    extents = Extents(256)
    parts = [extents.allocate(64) for _ in range(4)]
    assert extents.allocate(1) is None
    for offset in (parts[2], parts[0], parts[3], parts[1]):
        extents.release(offset, 64)
    assert extents.allocate(256) == 0


def test_backends_are_chosen_by_the_variable(monkeypatch):
    kernels.backend.cache_clear()
    monkeypatch.setenv("LORAMILL_KERNELS", "abacus")
    with pytest.raises(SettingsInvalid, match=r"abacus.*reference"):
        kernels.backend()
    monkeypatch.setenv("LORAMILL_KERNELS", "reference")
    assert kernels.backend() is reference
    kernels.backend.cache_clear()


def test_returned_memory_is_reused_whole():
    recycler = Recycler(16 << 20)
    with recycler.lending() as lend:
        large, small = lend(6 << 20), lend(100)
        assert large.data_ptr() % 64 == 0
        assert large.data_ptr() != small.data_ptr()
    assert recycler.allocate(90).data_ptr() == small.data_ptr(), "the smallest that suffices"
    again = recycler.allocate((6 << 20) + 5)
    assert (again.data_ptr(), again.numel()) == (large.data_ptr(), (6 << 20) + 5), "its pages hold a little more"
    huge = host_memory(20 << 20)
    recycler.release(huge)
    assert recycler.allocate(20 << 20).data_ptr() != huge.data_ptr(), "more than it may keep"


def test_populating_pages_changes_no_byte():
    memory = host_memory(3 << 20)
    memory[::1000] = 7
    populate(memory[5 : 2 << 20])
    assert memory.count_nonzero() == len(memory[::1000])
    slab = new_slab()
    slot = put(slab, {"q": delta(2)})
    before = slab.arena.clone()
    slab.prepare(1 << 20)
    assert torch.equal(slab.arena, before)
    slab.free(slot)
    slab.prepare(1 << 20)
