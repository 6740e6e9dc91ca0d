"""Rollouts and the aliases that they move, each in the caller's transaction."""

from __future__ import annotations

import time
from collections.abc import Mapping

from sqlalchemy.orm import Session

from loramill.errors import Conflict, InvalidRequest, NotFound
from loramill.names import SHORT_HASH_LENGTH, AdapterName
from loramill.registry import adapters
from loramill.registry.rollouts import records
from loramill.types import (
    AdapterRecord,
    Alias,
    Introduction,
    RolloutKind,
    RolloutOutcome,
    RolloutRecord,
    WatchPolicy,
)


def start_canary(
    session: Session,
    name: AdapterName | str,
    *,
    share: float,
    shadow: bool = False,
    version: str | None = None,
    policy: WatchPolicy | None = None,
    changes: Mapping[str, float] | None = None,
    promote_at_end: bool = False,
    run: str | None = None,
    reason: str = "canary",
    now: float | None = None,
) -> RolloutRecord:
    """Lets the challenger answer a share of the requests, or changes the share of the open canary of that version.

    Args:
        share: 0 to 1; users keep the version that they get while the share does not shrink.
        shadow: the challenger answers copies of that share instead, which are not sent.
        version: becomes the challenger (a full hash); None: the present challenger.
        policy: when the canary is ended; None: that of the open canary, or the default one.
        changes: fields of that policy to set, already validated; the others stay as they are.
        promote_at_end: at the end of the policy's window it is promoted or not; otherwise an open canary keeps its
            end, and a new one lasts until someone ends it, unless it is much worse than the champion.
        run: the nightly run that starts it.

    Raises:
        NotFound: the adapter or the version does not exist.
        Conflict: the adapter has no champion or no challenger, or is pinned.
        InvalidRequest: the share is not between 0 and 1.
    """
    if not 0 <= share <= 1:
        raise InvalidRequest(f"The share has to be between 0 and 1, not {share:g}.", param="share")
    now = time.time() if now is None else now
    adapters.lock(session, name)
    adapter = adapters.get(session, name)
    if adapter.pinned:
        raise Conflict(f"'{name}' is pinned to its champion: `loramill adapters unpin {name}` allows a canary.")
    if version is not None and version != adapter.challenger:
        adapters.move(session, name, Alias.CHALLENGER, version, reason)
        adapter = adapters.get(session, name)
    if adapter.challenger is None or adapter.champion is None:
        raise Conflict(
            f"'{name}' has no challenger: train or import a version, or name one of `loramill adapters show {name}`."
        )
    kind = RolloutKind.SHADOW if shadow else RolloutKind.CANARY
    found = records.find_open(session, name)
    same = found if found is not None and found.version == adapter.challenger else None  # its users keep their side
    policy = (policy or (WatchPolicy() if same is None else same.policy)).model_copy(update=changes)
    ends_at = now + policy.window_seconds if promote_at_end else None
    if same is not None:
        ends_at = same.ends_at if ends_at is None else ends_at
        return records.change(session, name, kind=kind, share=share, ends_at=ends_at, policy=policy)
    if found is not None:
        records.end(session, name, RolloutOutcome.ENDED, f"{adapter.challenger[:SHORT_HASH_LENGTH]} is tried", now)
    return records.add(
        session,
        name,
        kind=kind,
        version=adapter.challenger,
        baseline=adapter.champion,
        share=share,
        run=run,
        policy=policy,
        started_at=now,
        ends_at=ends_at,
    )


def introduce(
    session: Session, name: AdapterName | str, version: str, how: Introduction, *, run: str, reason: str
) -> RolloutKind | None:
    """Promotes a version, or starts its canary or shadow, at the end of which it is promoted or dropped.

    The first version of an adapter is its champion already, and has nothing to be compared with.

    Returns:
        What was started; None: the version was promoted, and is watched if the policy's window is not 0.

    Raises:
        NotFound: the adapter or the version does not exist.
        Conflict: the adapter is pinned to another version.
    """
    if adapters.get(session, name).champion in (None, version) or not how.share:
        promote_watched(session, name, version, reason, policy=how.policy, run=run)
        return None
    started = start_canary(
        session,
        name,
        share=how.share,
        shadow=how.shadow,
        version=version,
        policy=how.policy,
        promote_at_end=True,
        run=run,
        reason=reason,
    )
    return started.kind


def end_canary(session: Session, name: AdapterName | str, reason: str) -> RolloutRecord:
    """Ends the canary of an adapter: its champion answers all requests. The challenger stays the challenger.

    Raises:
        NotFound: the adapter does not exist.
        Conflict: it has no canary.
    """
    adapters.lock(session, name)
    found = records.find_open(session, name)
    if found is None or found.kind is RolloutKind.WATCH:
        raise Conflict(f"'{name}' has no canary: `loramill adapters canary {name} --share 0.1` starts one.")
    ended = records.end(session, name, RolloutOutcome.ENDED, reason)
    assert ended is not None
    return ended


def promote_watched(
    session: Session,
    name: AdapterName | str,
    version: str,
    reason: str,
    *,
    policy: WatchPolicy,
    run: str | None = None,
    now: float | None = None,
) -> AdapterRecord:
    """Promotes a version, and watches it for the policy's window (0: not at all) against the champion before.

    Raises:
        NotFound, Conflict: as in `adapters.promote`.
    """
    now = time.time() if now is None else now
    before = adapters.get(session, name).champion
    promoted = adapters.promote(session, name, version, reason)
    if before in (None, version) or policy.window_seconds == 0:
        return promoted  # nothing to roll back to
    records.add(
        session,
        name,
        kind=RolloutKind.WATCH,
        version=version,
        baseline=before,
        share=1.0,
        run=run,
        policy=policy,
        started_at=now,
        ends_at=now + policy.window_seconds,
    )
    return promoted


def settle(
    session: Session, rollout: RolloutRecord, outcome: RolloutOutcome, reason: str, *, now: float
) -> RolloutRecord | None:
    """Ends a rollout as decided, and moves the aliases accordingly; does nothing if it has ended meanwhile.

    A canary is promoted and then watched, or its challenger is dropped; a new champion is kept, or rolled back.

    Returns:
        The rollout as it ended; None if it had ended, or its adapter was deleted.
    """
    name = rollout.adapter
    try:
        adapters.lock(session, name)
    except NotFound:
        return None
    found = records.find_open(session, name)
    if found is None or found.id != rollout.id:
        return None
    ended = records.end(session, name, outcome, reason, now)
    match outcome, found.kind:
        case RolloutOutcome.PROMOTED, _:
            promote_watched(session, name, found.version, reason, policy=found.policy, run=found.run, now=now)
        case RolloutOutcome.ROLLED_BACK, RolloutKind.WATCH:
            adapters.rollback(session, name, reason)
        case RolloutOutcome.ROLLED_BACK | RolloutOutcome.ENDED, _:
            adapters.move(session, name, Alias.CHALLENGER, None, reason)
        case _:
            pass  # it is the champion, and stays it
    return ended
