"""The decision which versions are removed: pure, from what is stored and what refers to it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from loramill.types import RetentionPolicy

DAY_SECONDS = 86400.0


@dataclass(frozen=True, slots=True)
class StoredVersion:
    """A version of an adapter.

    Attributes:
        checkpoint_steps: by job, the step of the checkpoint that this version is; empty for what jobs and imports
            publish.
        pins: what refers to it, in words, such as "champion"; a version with a pin is never removed.
    """

    id: str
    created_at: float
    bytes: int
    job: str | None = None
    checkpoint_steps: tuple[tuple[str, int], ...] = ()
    pins: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RetentionDecision:
    """Whether a version is removed, and why or why not."""

    version: StoredVersion
    remove: bool
    reason: str


def decide(versions: Sequence[StoredVersion], policy: RetentionPolicy, *, now: float) -> tuple[RetentionDecision, ...]:
    """Decides about all versions of one adapter; the decisions are in the order of the versions.

    What is pinned counts among the newest. Checkpoints are counted per job, by their steps.
    """
    published = [("", (each.created_at, each.id)) for each in versions if not each.checkpoint_steps]
    checkpoints = [(job, (step, each.id)) for each in versions for job, step in each.checkpoint_steps]
    ranks = _best_ranks([*published, *checkpoints])
    return tuple(_judge(version, ranks[version.id], policy, now) for version in versions)


def keeps_everything(policy: RetentionPolicy) -> bool:
    """Whether the policy removes no version at all."""
    return policy == RetentionPolicy()


def _best_ranks(members: Iterable[tuple[str, tuple[float, str]]]) -> dict[str, int]:
    """The rank of each version in its group, from 0 for the newest; its best rank if it is in several.

    Args:
        members: pairs of a group, and the order in the group with the version's ID.
    """
    groups: defaultdict[str, list[tuple[float, str]]] = defaultdict(list)
    for group, ordered in members:
        groups[group].append(ordered)
    ranks: dict[str, int] = {}
    for group_members in groups.values():
        for rank, (_, version) in enumerate(sorted(group_members, reverse=True)):
            ranks[version] = min(rank, ranks.get(version, rank))
    return ranks


def _judge(version: StoredVersion, rank: int, policy: RetentionPolicy, now: float) -> RetentionDecision:
    if version.pins:
        return RetentionDecision(version, remove=False, reason=", ".join(version.pins))
    if version.checkpoint_steps:
        what, keep, days = "its job's {} checkpoint", policy.keep_checkpoints, policy.checkpoint_days
    else:
        what, keep, days = "its adapter's {} version", policy.keep_versions, policy.version_days
    if keep is None and days is None:
        return RetentionDecision(version, remove=False, reason="no retention is set")
    if keep is not None and rank < keep:
        return RetentionDecision(version, remove=False, reason=_newest(what, keep))
    age = (now - version.created_at) / DAY_SECONDS
    if days is not None and age < days:
        return RetentionDecision(version, remove=False, reason=f"younger than {_days(days)}")
    reasons = [f"not {_newest(what, keep)}"] if keep is not None else []
    reasons += [f"older than {_days(days)}"] if days is not None else []
    return RetentionDecision(version, remove=True, reason=" and ".join(reasons))


def _newest(what: str, count: int) -> str:
    return what.format("newest") if count == 1 else f"one of {what.format(f'{count} newest')}s"


def _days(days: float) -> str:
    return f"{days:g} day{'' if days == 1 else 's'}"
