"""Which parts share a pass: by tables, and by what has to hold for all of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramill.jobs.train.engine.schedule import WaitingPart, choose_parts, level_served


def training(tenant: str, tokens: int) -> WaitingPart:
    return WaitingPart(tenant, tokens, training=True)


@pytest.mark.parametrize(
    ("waiting", "served", "expected"),
    [
        ([training("a", 60), training("b", 40)], {}, [0, 1]),
        ([training("a", 60), training("b", 41)], {}, [0]),
        ([training("a", 60), training("b", 41)], {"a": 1}, [1]),
        ([training("a", 900)], {}, [0]),  # larger than a pass: alone
        ([training("a", 50), training("a", 50), training("b", 50)], {}, [0, 2]),  # one of each tenant at a time
        ([training("a", 50), training("a", 30), training("b", 60)], {"b": 1000}, [0, 1]),
        ([training("a", 50), WaitingPart("b", 5, training=False)], {}, [0]),
        ([WaitingPart("b", 5, training=False), training("a", 50)], {"b": 1}, [1]),
        ([training("a", 50), WaitingPart("b", 5, training=True, alone=True)], {}, [0]),
        ([WaitingPart("b", 5, training=True, alone=True), training("a", 50)], {}, [0]),
    ],
)
def test_the_parts_of_the_next_pass(waiting: list[WaitingPart], served: dict[str, int], expected: list[int]) -> None:
    assert choose_parts(waiting, served, 100) == expected


@pytest.mark.parametrize(
    ("served", "waiting", "expected"),
    [
        ({}, {"a", "b"}, {"a": 0, "b": 0}),
        ({"a": 500, "b": 400}, {"a", "b"}, {"a": 500, "b": 400}),
        ({"a": 500, "b": 400}, {"a", "b", "c"}, {"a": 500, "b": 400, "c": 400}),  # c joins, or waited for data
        ({"a": 500, "b": 400}, {"a"}, {"a": 500}),  # b left
        ({"b": 400}, {"a"}, {"a": 0}),
    ],
)
def test_tenants_that_wait_for_passes_again_start_level(
    served: dict[str, int], waiting: set[str], expected: dict[str, int]
) -> None:
    assert level_served(served, waiting) == expected


parts = st.builds(
    WaitingPart, st.sampled_from("abcd"), st.integers(1, 150), training=st.booleans(), alone=st.booleans()
)


@given(st.lists(parts, min_size=1, max_size=12), st.dictionaries(st.sampled_from("abcd"), st.integers(0, 500)))
def test_a_pass_is_of_one_kind_fits_and_begins_with_the_tenant_served_least(
    waiting: list[WaitingPart], served: dict[str, int]
) -> None:
    chosen = [waiting[index] for index in choose_parts(waiting, served, 100)]
    assert len(chosen) == 1 or sum(part.tokens for part in chosen) <= 100
    assert len({part.training for part in chosen}) == 1
    assert len(chosen) == 1 or not any(part.alone for part in chosen)
    least = min(served.get(part.tenant, 0) for part in waiting)
    assert least in [served.get(part.tenant, 0) for part in chosen]


@given(st.lists(parts, min_size=2, max_size=8))
def test_no_tenant_is_starved(waiting: list[WaitingPart]) -> None:
    """Each part is requested again as soon as it was computed: tenants are served alike."""
    served: dict[str, int] = {}
    for _ in range(60):
        for index in choose_parts(waiting, served, 100):
            served[waiting[index].tenant] = served.get(waiting[index].tenant, 0) + waiting[index].tokens
    amounts = [served.get(tenant, 0) for tenant in {part.tenant for part in waiting}]
    largest = sum(part.tokens for part in waiting)
    assert max(amounts) - min(amounts) <= largest or min(amounts) > 0
