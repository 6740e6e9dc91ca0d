"""Rollouts as reports show them: what each does, what it has measured, and how it ended."""

from __future__ import annotations

from pydantic import Field
from sqlalchemy.orm import Session

from loramill.pipelines.nightly.rollouts.policy import decide
from loramill.registry import nightly
from loramill.registry.rollouts import records, traffic
from loramill.types import FrozenModel, NightlyRun, RolloutKind, RolloutState, TrafficCounts
from loramill.types.rollouts import bucket_seconds, median_bucket

#: State of a rollout that has not ended; the others are the names of `RolloutOutcome`.
UNDER_WAY = "under way"
#: ID of no nightly run, to find the rollouts that are open whatever started them.
_NO_RUN = ""
#: Runs that are searched for the one before.
_SEARCHED_RUNS = 60


class VersionSignals(FrozenModel):
    """What the answers of one version of a rollout were like."""

    version: str = Field(description="ID of the version.")
    requests: int = Field(description="Number of requests.")
    failed: int = Field(description="Number of them that failed.")
    empty: int = Field(description="Number of them with an empty answer.")
    cut: int = Field(description="Number of them with an answer that reached its length limit.")
    good: int = Field(description="Number of good ratings.")
    bad: int = Field(description="Number of bad ratings.")
    seconds: float | None = Field(description="Median time per answer, rounded up by at most 19%. Null: unknown.")


class RolloutOverview(FrozenModel):
    """A canary, a shadow or a watch, as a report shows it."""

    adapter: str = Field(description="Name of the adapter.")
    kind: RolloutKind = Field(
        description="canary: the version answers a share of the requests; shadow: copies of them; watch: it is "
        "a new champion."
    )
    share: float = Field(description="Share of the requests that the version answers, 0 to 1.")
    state: str = Field(description="under way, promoted, rolled back, kept, or ended (by hand, or an alias moved).")
    reason: str = Field(description="Why it ended, or what it waits for.")
    run: str | None = Field(description="Nightly run that started it. Null: it was started by hand.")
    started_at: float = Field(description="When it started, in seconds since the epoch.")
    ends_at: float | None = Field(description="When its window ends. Null: it is ended by hand.")
    ended_at: float | None = Field(description="When it ended. Null: it is under way.")
    tried: VersionSignals = Field(description="Answers of the version that is tried.")
    compared: VersionSignals | None = Field(description="Answers of the version it is compared with.")


def rollouts_around(session: Session, run: NightlyRun | None, now: float) -> list[RolloutOverview]:
    """Returns the rollouts that a run started, and those that were under way between the run before and its end.

    Without a run, those are returned that are under way now. Those under way come first, and then the newest.
    """
    if run is None:
        found = records.list_around(session, _NO_RUN, since=now, until=now)
    else:
        began = [each.created_at for each in nightly.list_runs(session, _SEARCHED_RUNS)]
        since = max((each for each in began if each < run.created_at), default=run.created_at)
        until = now if run.finished_at is None else run.finished_at
        found = records.list_around(session, run.id, since=since, until=until)
    shown = [rollout_overview(each, now) for each in traffic.measured_all(session, found)]
    return sorted(shown, key=lambda each: each.ended_at is not None)


def rollout_overview(state: RolloutState, now: float) -> RolloutOverview:
    """Returns a rollout as reports show it."""
    ended = state.outcome is not None
    return RolloutOverview(
        adapter=state.adapter,
        kind=state.kind,
        share=state.share,
        state=str(state.outcome) if ended else UNDER_WAY,
        reason=state.reason if ended else decide(state, now=now).reason,
        run=state.run,
        started_at=state.started_at,
        ends_at=state.ends_at,
        ended_at=state.ended_at,
        tried=_signals(state.version, state.tried),
        compared=None if state.baseline is None else _signals(state.baseline, state.compared),
    )


def _signals(version: str, counts: TrafficCounts) -> VersionSignals:
    median = median_bucket(counts.total_histogram)
    return VersionSignals(
        version=version,
        requests=counts.requests,
        failed=counts.errors,
        empty=counts.empty,
        cut=counts.cut,
        good=counts.good,
        bad=counts.bad,
        seconds=None if median is None else round(bucket_seconds(median), 3),
    )
