"""The block pool by itself, against a model of it."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramill.errors import EngineFault
from loramill.serve.engine.scheduling.block_pool import BlockPool, block_key, root_key


def chain(version, *blocks):
    keys, key = [], root_key(version)
    for tokens in blocks:
        key = block_key(key, tokens)
        keys.append(key)
    return keys


def test_a_key_depends_on_the_version_and_all_tokens_before():
    a, b, c = [1, 2], [3, 4], [5, 6]
    keys = {
        *chain(None, a, b, c),
        *chain("v", a, b, c),
        *chain("w", a, b, c),
        *chain("v", b, b, c),
        *chain("v", a, c, c),
        *chain("base", a, b),
    }
    assert len(keys) == 3 * 3 + 3 + 2 + 2
    assert chain("v", a, b) == chain("v", a, b, c)[:2]


def test_a_prefix_is_found_until_its_blocks_are_reused():
    pool = BlockPool(4)
    keys = chain("v", [1], [2], [3])
    blocks = pool.allocate(3)
    for block, key in zip(blocks, keys, strict=True):
        pool.cache(block, key)
    assert pool.match(keys) == blocks
    pool.free(blocks)
    assert pool.available == 4
    assert pool.match(keys) == blocks
    assert pool.match(chain("w", [1])) == []
    # The free one goes first, then the end of the prefix.
    pool.allocate(2)
    assert pool.match(keys) == blocks[:2]
    assert pool.needed(blocks[:2], 1) == 3 > pool.available
    pool.incref(blocks[:2])
    assert pool.available == 0
    with pytest.raises(EngineFault):
        pool.check_integrity({})


def test_the_first_block_of_a_key_is_shared():
    pool = BlockPool(2)
    first, second = pool.allocate(2)
    key = root_key(None)
    pool.cache(first, key)
    pool.cache(second, key)
    assert pool.match([key]) == [first]
    pool.free([second])
    pool.free([first])
    assert pool.match([key]) == [first]
    pool.check_integrity({})


@given(st.integers(1, 8), st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4)), max_size=40))
def test_no_block_is_lost_or_allocated_twice(count, events):
    pool = BlockPool(count)
    held: list[list[int]] = []
    for step, (kind, number) in enumerate(events):
        if kind < 2:
            keys = chain("v", *([n] for n in range(number)))
            shared = pool.match(keys) if kind else []
            more = number - len(shared)
            if pool.needed(shared, more) > pool.available:
                continue
            pool.incref(shared)
            blocks = shared + pool.allocate(more)
            assert len(set(blocks)) == number
            new = set(blocks[len(shared) :])
            assert not new & {block for other in held for block in other}
            for block, key in zip(blocks, keys, strict=True):
                pool.cache(block, key)
            held.append(blocks)
        elif held:
            pool.free(held.pop(step % len(held)))
        pool.check_integrity(dict(Counter(block for blocks in held for block in blocks)))
    for blocks in held:
        pool.free(blocks)
    assert pool.available == count
