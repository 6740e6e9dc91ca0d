"""Steps of a run that an older release began: those that the next stage cannot read are done again."""

from __future__ import annotations

from loramill.pipelines.nightly.context import NightlyContext
from loramill.registry.nightly_again import forget_steps


def forget_older_steps(context: NightlyContext) -> None:
    """Forgets evaluations without results per example, and decisions that are not a verdict, of open adapters.

    Releases before those results recorded the means alone, and the decision as a boolean.
    """
    ended = context.done("promote")
    means = {adapter for adapter, result in context.done("evaluate").items() if "results" not in result} - ended.keys()
    booleans = {adapter for adapter, result in context.done("gate").items() if "verdict" not in result} - ended.keys()
    if not means | booleans:
        return
    with context.registry.writing() as session:
        context.check_lease(session)
        forget_steps(session, context.run.id, sorted(means), ("evaluate", "gate"))
        forget_steps(session, context.run.id, sorted(booleans), ("gate",))
