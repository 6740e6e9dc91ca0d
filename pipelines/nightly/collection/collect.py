"""The collection stage: an adapter's new data, frozen into the datasets and the job spec of one nightly run."""

from __future__ import annotations

from functools import partial

from loramill.names import AdapterName
from loramill.pipelines.nightly.collection.plan import CollectionRules, InsufficientData, NothingNew, plan_training
from loramill.pipelines.nightly.context import NightlyContext
from loramill.registry import nightly
from loramill.types import StepStatus


def collect_all(context: NightlyContext) -> None:
    """Freezes each adapter's new data into datasets for this run."""
    with context.registry.reading() as session:
        names = [data.adapter for data in nightly.pending_data(session)]
    adapters_with_data = [name for name in names if context.definition.includes(name)]
    ended = {step.adapter for step in context.steps() if step.status is not StepStatus.PENDING}
    for adapter in adapters_with_data:
        if adapter not in ended:  # data that arrived after this run had collected is for the next run
            context.attempt(adapter, "collect", partial(_collect_adapter, context, adapter))


def _collect_adapter(context: NightlyContext, adapter: str) -> None:
    name = AdapterName.parse(adapter)
    definition = context.definition.for_adapter(adapter)
    minimum = context.settings.jobs.min_examples
    rules = CollectionRules(
        minimum,
        definition.replay.plain_examples,
        definition.split,
        definition.train,
        definition.feedback.min_pairs,
    )
    with context.registry.writing() as session:
        if new_data := nightly.collect(session, context.run.id, name):
            artifacts, run = context.registry.artifacts, context.run.id
            plan = plan_training(session, artifacts, name, new_data, context.base, run, rules)
            if isinstance(plan, InsufficientData):
                nightly.release(session, run, name)
                context.report(context.record_pending(session, adapter, "collect", {"waiting": plan.reason}))
            elif isinstance(plan, NothingNew):
                skipped = {"skipped": plan.reason} | plan.result
                context.report(context.record_pending(session, adapter, "collect", skipped))
            else:
                context.finish(session, adapter, "collect", plan)
