"""Slots: allocation, accounting, what doesn't fit, which backend."""

import pytest
import torch

from loramill import kernels
from loramill.errors import AdapterInvalid, EngineFault, SettingsInvalid
from loramill.kernels import Delta, Site, Slab, pack

SITES = [Site(8, ("q", "k"), (8, 4)), Site(8, ("o",), (8,))]


def delta(r: int, d_in: int = 8, d_out: int = 8, *, gain: bool = False) -> Delta:
    return Delta(torch.ones(r, d_in), torch.ones(d_out, r), torch.ones(d_out) if gain else None)


def test_a_full_slab_refuses_and_a_freed_slot_comes_again():
    slab = Slab(SITES, slots=2)
    first, second = slab.allocate(), slab.allocate()
    assert slab.free_slots == 0
    with pytest.raises(EngineFault, match="no free slot"):
        slab.allocate()
    slab.free(first)
    assert slab.allocate() not in (first, second)
    slab.check_integrity()


def test_bytes_count_what_is_loaded_without_padding():
    slab = Slab(SITES, slots=2)
    slot = slab.allocate()
    slab.load(slot, pack(SITES, {"q": delta(3), "k": delta(1, d_out=4), "o": delta(2, gain=True)}))
    assert slab.bytes == 4 * ((3 * 8 + 3 * 8) + (8 + 4) + (2 * 8 + 2 * 8 + 8))
    slab.free(slot)
    assert slab.bytes == 0


def test_a_slot_used_before_it_is_loaded_is_an_error():
    slab = Slab(SITES, slots=1)
    with pytest.raises(EngineFault, match="before an adapter was loaded"):
        slab.views[0].weights(slab.allocate())


def test_an_adapter_packed_for_other_sites_is_refused():
    slab = Slab(SITES, slots=1)
    with pytest.raises(EngineFault, match="1 sites"):
        slab.load(slab.allocate(), pack(SITES[:1], {}))


@pytest.mark.parametrize(
    ("deltas", "words"),
    [
        ({"z": delta(2)}, "targets 'z'"),
        ({"k": delta(2)}, r"B of 'k' is \[8, 2\].*needs \[4, 2\]"),
        ({"q": delta(2, d_in=7)}, r"A of 'q' is \[2, 7\]"),
        ({"q": delta(0)}, "rank above 0"),
        ({"q": Delta(torch.ones(2, 8), torch.ones(8, 2), torch.ones(3))}, "gain of 'q'"),
    ],
)
def test_deltas_that_do_not_fit_are_named(deltas, words):
    with pytest.raises(AdapterInvalid, match=words):
        pack(SITES, deltas)


@pytest.mark.parametrize("broken", ["twice", "full"])
def test_broken_books_are_found(broken):
    slab = Slab(SITES, slots=2)
    slot = slab.allocate()
    slab.load(slot, pack(SITES, {}))
    slab._free.append(slab._free[0] if broken == "twice" else slot.index)
    with pytest.raises(EngineFault, match=r"[Ff]ree"):
        slab.check_integrity()


def test_an_unknown_backend_is_a_setting_to_correct(monkeypatch):
    kernels.backend.cache_clear()
    monkeypatch.setenv("LORAMILL_KERNELS", "abacus")
    with pytest.raises(SettingsInvalid, match=r"abacus.*reference"):
        kernels.backend()
    monkeypatch.setenv("LORAMILL_KERNELS", "reference")
    assert kernels.backend() == "reference"
    kernels.backend.cache_clear()
