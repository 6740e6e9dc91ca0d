"""A definition in words, as `loramill nightly validate` prints it. Pure functions."""

from __future__ import annotations

from datetime import timedelta

from loramill.durations import format_duration
from loramill.pipelines.nightly.definition.promotion import SHADOW_SHARE, EvaluateDefinition, GateDefinition
from loramill.pipelines.nightly.definition.schema import AdapterDefinition, NightlyDefinition, OverrideDefinition
from loramill.pipelines.nightly.definition.training import (
    BudgetDefinition,
    FeedbackDefinition,
    ReplayDefinition,
    ScheduleDefinition,
    SplitDefinition,
    TrainDefinition,
)
from loramill.plural import counted, listed

#: Adapters that are named in one line.
_SHOWN_ADAPTERS = 8


def describe(definition: NightlyDefinition, adapters: list[str] | None, next_times: list[str]) -> list[tuple[str, str]]:
    """Returns a sentence for each topic.

    Args:
        definition: the definition.
        adapters: all adapters of the registry; None: they are not known.
        next_times: the next scheduled times.
    """
    split = definition.split
    found = [
        ("schedule", _schedule(definition.schedule, next_times)),
        *([] if adapters is None else [("adapters", _adapters(definition, adapters))]),
        *(("source", f"{each.url}, for {listed(each.adapters)}") for each in definition.sources),
        (
            "new data",
            f"{split.held_out:.0%} is held out{_divided(split)}; up to {split.max_bad_rows:.0%} bad rows are left out",
        ),
        ("feedback", _feedback(definition.feedback)),
        ("training", _training(definition.train)),
        ("replay", _replay(definition.replay)),
        ("metrics", ", ".join(definition.evaluate.computed_metrics)),
        *_evaluation(definition.evaluate, definition.gate),
        ("gate", _gate(definition.gate)),
        ("promotion", _promotion(definition)),
        ("budget", _budget(definition.budget)),
        ("webhook", f"after runs: {definition.notify.on}" if definition.notify.webhook else "none"),
    ]
    return found + [("override", _override(each)) for each in definition.overrides]


def _divided(split: SplitDefinition) -> str:
    return "" if split.by is None else f", all rows of one {split.by} in the metadata together"


def _evaluation(evaluate: EvaluateDefinition, gate: GateDefinition) -> list[tuple[str, str]]:
    """What is set."""
    found = []
    if evaluate.scorer is not None:
        limit = _text(evaluate.scorer_time_limit)
        found.append(("scorer", f"{evaluate.scorer}, in a process of its own, with {limit} for a chunk of answers"))
    if evaluate.judge is not None:
        found.append(("judge", f"{evaluate.judge.model} at {evaluate.judge.url}, which gets questions and answers"))
    if evaluate.slices_by is not None:
        found.append(("slices", f"by {evaluate.slices_by} in the metadata of examples"))
    if evaluate.golden is not None:
        found.append(("golden set", f"{evaluate.golden}; {gate.min_golden:.0%} must be right"))
    return found


def _schedule(schedule: ScheduleDefinition, next_times: list[str]) -> str:
    if not schedule.enabled:
        return "none; `loramill nightly run` starts a run"
    missed = "a missed run is caught up once" if schedule.missed == "once" else "a missed run is skipped"
    coming = f"next {', '.join(next_times)}" if next_times else "no date matches in 50 years"
    return f"{schedule.cron} in {schedule.timezone}; {coming}; {missed}"


def _adapters(definition: NightlyDefinition, adapters: list[str]) -> str:
    included = [each for each in adapters if definition.includes(each)]
    names = ", ".join(included[:_SHOWN_ADAPTERS]) + (", …" if len(included) > _SHOWN_ADAPTERS else "")
    return f"{len(included)} of {counted(len(adapters), 'adapter')}" + (f": {names}" if names else "")


def _feedback(feedback: FeedbackDefinition) -> str:
    parts = ["corrections become examples"] if feedback.corrections else []
    if feedback.ratings:
        least = counted(feedback.min_pairs, "pair")
        parts.append(f"ratings and corrections become preferences (at least {least})")
    return "; ".join(parts) or "not used"


def _training(train: TrainDefinition) -> str:
    start = {
        "champion": "from the champion",
        "fresh": "from new weights on old and new data",
        "both": "from the champion and from new weights; the one with the lower validation loss challenges",
    }[train.start]
    options = train.options.model_dump(mode="json", exclude_unset=True)
    shown = f", with {listed([f'{name} {value}' for name, value in options.items()])}" if options else ""
    return f"{start}, at priority {train.priority}{shown}"


def _replay(replay: ReplayDefinition) -> str:
    plain = counted(replay.plain_examples, "old example")
    if not replay.on_policy:
        return plain
    return (
        f"{plain}; {replay.on_policy:.0%} of the training data is old prompts with the champion's own answers "
        f"(token F1 of at least {replay.min_score:g})"
    )


def _gate(gate: GateDefinition) -> str:
    gain = f"a gain of at least {gate.min_gain:g}" if gate.min_gain else "a gain"
    loss = f"a loss of at most {gate.max_loss:g}" if gate.max_loss else "no loss"
    return f"{gate.metric}, with a confidence of {gate.confidence:.0%}: {gain} on new data, and {loss} on old"


def _override(override: OverrideDefinition) -> str:
    sections = [name for name in AdapterDefinition.model_fields if getattr(override, name) is not None]
    return f"{listed(sections) if sections else 'nothing'} for {listed(override.adapters)}"


def _promotion(definition: NightlyDefinition) -> str:
    canary, watch = definition.canary, definition.watch
    window = _text(watch.window)
    tried = "copies of " if canary.shadow else ""
    share = f"{canary.share or SHADOW_SHARE:.0%} of the requests"
    start = f"after a challenger answers {tried}{share} for {window}" if canary.starts else "at once"
    watched = (
        f"watched for {window} and at least {counted(watch.min_requests, 'request')}" if watch.window else "not watched"
    )
    approval = "after a person has approved it, " if definition.gate.approval == "manual" else ""
    return f"{approval}{start}; a new champion is {watched}"


def _budget(budget: BudgetDefinition) -> str:
    parts = [_text(budget.wall_time)] if budget.wall_time is not None else []
    parts += [f"{budget.gpu_seconds:,.0f} GPU-seconds"] if budget.gpu_seconds is not None else []
    parts += [f"{budget.tokens:,} tokens"] if budget.tokens is not None else []
    return listed(parts) if parts else "unlimited"


def _text(duration: timedelta) -> str:
    return format_duration(duration.total_seconds())
