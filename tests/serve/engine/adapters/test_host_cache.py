"""The host cache by itself."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from loramill.kernels import PackedAdapter
from loramill.serve.engine.adapters import host_cache
from loramill.serve.engine.adapters.host_cache import HostCache


def packed(size: int, content: int) -> PackedAdapter:
    return PackedAdapter(torch.full((size,), content, dtype=torch.uint8), np.zeros((1, 1, 4), np.int64))


def has(cache: HostCache, version: str) -> bool:
    found = cache.acquire(version)
    if found is not None:
        cache.release(version)
    return found is not None


def test_the_least_recently_used_adapter_is_evicted_first():
    cache = HostCache(300 * 64)
    for version in "abc":
        cache.put(version, packed(100 * 64, ord(version)))
    assert has(cache, "a")
    cache.put("d", packed(100 * 64, 1))
    assert [has(cache, version) for version in "abcd"] == [True, False, True, True]
    assert cache.bytes == 300 * 64


def test_a_borrowed_adapter_is_not_evicted():
    cache = HostCache(200 * 64)
    cache.put("a", packed(100 * 64, 1))
    cache.put("b", packed(100 * 64, 2))
    a = cache.acquire("a")
    cache.put("c", packed(150 * 64, 3))
    assert [has(cache, version) for version in "abc"] == [True, True, False], "no adapter is evicted in vain"
    cache.put("c", packed(100 * 64, 3))
    assert [has(cache, version) for version in "abc"] == [True, False, True]
    assert a.data.eq(1).all()
    cache.release("a")
    cache.put("d", packed(200 * 64, 4))
    assert [has(cache, version) for version in "acd"] == [False, False, True]


def test_an_adapter_larger_than_the_cache_is_not_kept():
    cache = HostCache(64)
    cache.put("a", packed(65, 1))
    assert not has(cache, "a")
    assert cache.bytes == 0
    nothing = HostCache(0)
    nothing.put("a", packed(1, 1))
    assert not has(nothing, "a")


def test_nothing_is_cached_before_the_memory_is_locked(monkeypatch):
    monkeypatch.setattr(
        host_cache, "page_locked_blocks", lambda size: [torch.zeros(size, dtype=torch.uint8)] if size else []
    )
    cache = HostCache(64, locked=True)
    cache.put("a", packed(64, 1))
    assert not has(cache, "a")
    cache.prepare()
    cache.put("a", packed(64, 1))
    assert has(cache, "a")
    plain = HostCache(64)
    plain.put("a", packed(64, 1))
    plain.prepare()
    assert has(plain, "a") and plain.bytes == 64


def test_an_adapter_is_in_one_block_and_takes_the_place_of_the_oldest_in_any(monkeypatch):
    sizes = [4 * 64, 2 * 64]
    monkeypatch.setattr(
        host_cache, "page_locked_blocks", lambda size: [torch.zeros(each, dtype=torch.uint8) for each in sizes]
    )
    cache = HostCache(sum(sizes), locked=True)
    cache.prepare()
    cache.put("too large", packed(5 * 64, 1))
    for version, size in (("a", 3), ("b", 2), ("c", 1)):
        cache.put(version, packed(size * 64, ord(version)))
    assert [has(cache, version) for version in ("too large", "a", "b", "c")] == [False, True, True, True]
    assert cache.bytes == sum(sizes)
    cache.put("d", packed(2 * 64, 4))
    assert [has(cache, version) for version in "abcd"] == [False, True, True, True]
    for version in "bcd":
        found = cache.acquire(version)
        assert found.data.eq(4 if version == "d" else ord(version)).all()


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 40), st.booleans()), max_size=40))
def test_an_adapter_is_cached_whole_or_not_at_all(events):
    cache = HostCache(64 * 64)
    sizes: dict[str, int] = {}
    lent = []
    for version, size, keep in events:
        sizes.setdefault(version, size * 64)
        cache.put(version, packed(sizes[version], ord(version)))
        found = cache.acquire(version)
        if found is not None:
            assert found.bytes == sizes[version]
            lent.append((version, found))
        if lent and not keep:
            cache.release(lent.pop(0)[0])
        for other, adapter in lent:
            assert adapter.data.eq(ord(other)).all()
        assert cache.bytes <= 64 * 64
