"""Which versions are removed: tables, and what holds for any versions and policy."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramill.registry.retention.policy import DAY_SECONDS, RetentionDecision, StoredVersion, decide
from loramill.types import RetentionPolicy

NOW = 1000 * DAY_SECONDS


def version(
    id_: str, days: float, *, steps: tuple[tuple[str, int], ...] = (), pins: tuple[str, ...] = ()
) -> StoredVersion:
    return StoredVersion(id_, NOW - days * DAY_SECONDS, 10, "ftjob-1", steps, pins)


#: "e" is the newest.
FIVE = [version(name, days) for name, days in zip("abcde", (40, 30, 20, 10, 1), strict=True)]
CHECKPOINTS = [version(str(step), 5 - step, steps=(("ftjob-1", step),)) for step in (1, 2, 3)]


def removed(versions: list[StoredVersion], **policy: float) -> str:
    decisions = decide(versions, RetentionPolicy.model_validate(policy), now=NOW)
    assert [decision.version for decision in decisions] == versions
    return "".join(decision.version.id for decision in decisions if decision.remove)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ({}, ""),
        ({"keep_versions": 2}, "abc"),
        ({"keep_versions": 9}, ""),
        ({"version_days": 15}, "abc"),
        ({"version_days": 20}, "abc"),  # 20 days old is no longer younger than 20 days
        ({"version_days": 0.5}, "abcde"),
        ({"keep_versions": 4, "version_days": 15}, "a"),  # the newest four, whatever their age
        ({"keep_versions": 1, "version_days": 25}, "ab"),  # younger than 25 days, however many
        ({"keep_checkpoints": 1, "checkpoint_days": 1}, ""),  # about checkpoints alone
    ],
)
def test_versions_by_number_and_age(policy: dict[str, float], expected: str) -> None:
    assert removed(FIVE, **policy) == expected


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ({"keep_checkpoints": 1}, "12"),
        ({"checkpoint_days": 2.5}, "12"),
        ({"keep_checkpoints": 2, "checkpoint_days": 2.5}, "1"),
        ({"keep_versions": 1, "version_days": 1}, ""),
    ],
)
def test_checkpoints_by_step_and_age(policy: dict[str, float], expected: str) -> None:
    assert removed(CHECKPOINTS, **policy) == expected


def test_checkpoints_are_counted_per_job_and_not_among_the_versions() -> None:
    others = [version(f"x{step}", 1, steps=(("ftjob-2", step),)) for step in (1, 2)]
    assert removed([*CHECKPOINTS, *others, *FIVE], keep_checkpoints=1, keep_versions=4) == "12x1a"


def test_a_checkpoint_of_two_jobs_is_kept_for_either() -> None:
    shared = version("shared", 3, steps=(("ftjob-1", 0), ("ftjob-2", 9)))
    assert removed([*CHECKPOINTS, shared], keep_checkpoints=1) == "12"


def test_a_pinned_version_is_kept_and_counts_among_the_newest() -> None:
    versions = [*FIVE[:3], version("d", 10, pins=("champion",)), version("p", 90, pins=("previous", "evaluated"))]
    assert removed(versions, keep_versions=2) == "ab"
    kept = {decision.version.id: decision for decision in decide(versions, RetentionPolicy(keep_versions=1), now=NOW)}
    assert kept["p"] == RetentionDecision(versions[4], remove=False, reason="previous, evaluated")


@pytest.mark.parametrize(
    ("policy", "reasons"),
    [
        ({}, ["no retention is set"] * 5),
        (
            {"keep_versions": 1, "version_days": 15},
            [
                *["not its adapter's newest version and older than 15 days"] * 3,
                "younger than 15 days",
                "its adapter's newest version",
            ],
        ),
        (
            {"keep_versions": 3},
            [*["not one of its adapter's 3 newest versions"] * 2, *["one of its adapter's 3 newest versions"] * 3],
        ),
    ],
)
def test_every_decision_has_its_reason(policy: dict[str, float], reasons: list[str]) -> None:
    decisions = decide(FIVE, RetentionPolicy.model_validate(policy), now=NOW)
    assert [decision.reason for decision in decisions] == reasons


NAMES = st.text("abcdef", min_size=1, max_size=3)
VERSIONS = st.lists(
    st.builds(
        StoredVersion,
        id=NAMES,
        created_at=st.floats(0, NOW),
        bytes=st.just(1),
        job=st.none(),
        checkpoint_steps=st.lists(st.tuples(st.sampled_from(["j1", "j2"]), st.integers(0, 4)), max_size=2).map(tuple),
        pins=st.lists(st.sampled_from(["champion", "evaluated"]), max_size=2).map(tuple),
    ),
    unique_by=lambda each: each.id,
    max_size=12,
)
POLICIES = st.builds(
    RetentionPolicy,
    keep_versions=st.none() | st.integers(1, 4),
    version_days=st.none() | st.floats(0.1, 900),
    keep_checkpoints=st.none() | st.integers(1, 3),
    checkpoint_days=st.none() | st.floats(0.1, 900),
)


@given(VERSIONS, POLICIES)
def test_pins_numbers_and_ages_are_kept_for_any_versions(
    versions: list[StoredVersion], policy: RetentionPolicy
) -> None:
    gone = {decision.version.id for decision in decide(versions, policy, now=NOW) if decision.remove}
    results = [each for each in versions if not each.checkpoint_steps]
    kept_results = {
        each.id for each in sorted(results, key=lambda each: (each.created_at, each.id))[-(policy.keep_versions or 0) :]
    }
    for each in versions:
        days = policy.checkpoint_days if each.checkpoint_steps else policy.version_days
        keep = policy.keep_checkpoints if each.checkpoint_steps else policy.keep_versions
        if (
            each.pins
            or (days is None and keep is None)
            or (days is not None and NOW - each.created_at < days * DAY_SECONDS)
        ):
            assert each.id not in gone
        elif not each.checkpoint_steps:
            assert (each.id in gone) == (policy.keep_versions is None or each.id not in kept_results)


@given(VERSIONS, POLICIES)
def test_what_is_left_is_kept_by_the_same_policy(versions: list[StoredVersion], policy: RetentionPolicy) -> None:
    left = [decision.version for decision in decide(versions, policy, now=NOW) if not decision.remove]
    assert not any(decision.remove for decision in decide(left, policy, now=NOW))
