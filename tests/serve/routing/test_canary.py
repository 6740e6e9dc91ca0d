"""Which users a canary's challenger answers."""

from __future__ import annotations

import math
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from loramill.serve.routing.canary import in_share
from loramill.types import RolloutKind, RolloutRecord, WatchPolicy


def canary(share: float, **changes: Any) -> RolloutRecord:
    values = {
        "id": 1,
        "adapter": "acme/support",
        "kind": RolloutKind.CANARY,
        "version": "2" * 64,
        "baseline": "1" * 64,
        "share": share,
        "run": None,
        "policy": WatchPolicy(),
        "started_at": 0.0,
        "ends_at": None,
    }
    return RolloutRecord.model_validate(values | changes)


@given(share=st.floats(0.01, 0.99), version=st.sampled_from("23456789"))
def test_a_share_of_the_users_gets_the_challenger(share: float, version: str) -> None:
    rollout = canary(share, version=version * 64)
    chosen = sum(in_share(rollout, f"user {number}") for number in range(2000))
    assert abs(chosen - 2000 * share) <= 5 * math.sqrt(2000 * share * (1 - share))


@given(key=st.text(), share=st.floats(0, 1), more=st.floats(0, 1), other=st.integers())
def test_a_user_stays_when_a_share_grows_or_time_passes(key: str, share: float, more: float, other: int) -> None:
    small, large = sorted((share, more))
    later = canary(large, id=2, started_at=float(other % 1000), baseline="3" * 64)
    assert in_share(later, key) or not in_share(canary(small), key)


@given(key=st.text())
def test_a_share_of_0_is_no_one_and_1_is_everyone(key: str) -> None:
    assert not in_share(canary(0.0), key)
    assert in_share(canary(1.0), key)


def test_another_version_tries_other_users() -> None:
    keys = [f"user {number}" for number in range(1000)]
    both = sum(in_share(canary(0.5), key) and in_share(canary(0.5, version="3" * 64), key) for key in keys)
    assert 200 <= both <= 300
