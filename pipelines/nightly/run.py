"""The nightly run: for every adapter with new data, collect, train, evaluate, gate, promote.

Each step of each adapter is a row, written in the transaction of the step's work: a run that was killed resumes where
it was, and no step is done twice. All adapters go through a stage together, so that their jobs train at the same time
and their questions share the engine's batches.

An adapter that fails in a stage leaves the run and affects no other. If the failure is transient (an outage, a quota),
the next run collects the adapter's data again; otherwise the data is set aside until someone retries or drops it, so
that no failure repeats every night.

While it works, a run also decides about open rollouts, as `loramill up` does all the time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence

from loramill.errors import SetupError, Unavailable
from loramill.models.catalog import find_base
from loramill.pipelines.nightly.collection.collect import collect_all
from loramill.pipelines.nightly.context import NightlyContext, OnProgress, Report, adapter_exists
from loramill.pipelines.nightly.definition import NightlyDefinition, load_definition
from loramill.pipelines.nightly.evaluate import evaluate_all
from loramill.pipelines.nightly.gateway import EvalGateway, HttpGateway
from loramill.pipelines.nightly.older_steps import forget_older_steps
from loramill.pipelines.nightly.promote import gate_all, promote_all
from loramill.pipelines.nightly.replay.on_policy import replay_all
from loramill.pipelines.nightly.rollouts.advance import deciding
from loramill.pipelines.nightly.schedule.lease import leased_run
from loramill.pipelines.nightly.sources.feedback import add_feedback
from loramill.pipelines.nightly.sources.files import scan_sources
from loramill.pipelines.nightly.train import train_all
from loramill.registry import Registry, nightly, sources
from loramill.settings import Settings
from loramill.types import NightlyRun, NightlyStep, StepStatus

#: Publishes a run that is about to end, and the failed steps of adapters that were deleted during it.
Publish = Callable[[NightlyRun, Sequence[NightlyStep]], object]


def run_nightly(
    registry: Registry,
    settings: Settings,
    *,
    report: Report = lambda step: None,
    publish: Publish = lambda run, deleted: None,
    progress: OnProgress = lambda progress: None,
    gateway: EvalGateway | None = None,
    definition: NightlyDefinition | None = None,
) -> NightlyRun:
    """Runs all stages for every adapter with new data, or resumes a run that was interrupted.

    Args:
        report: called with each step that ends, and at the end for each adapter that was deleted during the run.
        publish: called before the run ends, so that a run that is killed during the call is published once more when it
            is resumed.
        progress: called while jobs train and questions are answered.
        gateway: default: the one that the settings name.
        definition: default: that of nightly.yaml.

    Raises:
        NotRunning, Unavailable: the gateway or the database is unreachable; the next run resumes this one.
        BaseUnusable: the base was not found.
        DefinitionInvalid: nightly.yaml has faults.
        NightlyBusy: another process works on the run.
        LeaseLost: this process was silent too long, and another one has taken the run over.
    """
    base = find_base(settings.base, settings.cache, settings.quantization)
    definition = definition or load_definition(settings)
    gateway = gateway or HttpGateway(settings)
    with leased_run(registry) as run, deciding(registry):
        context = NightlyContext(run, registry, settings, base, report, gateway, progress, definition, run.holder)
        deleted = _run_stages(context)
        if context.in_progress("evaluate"):  # the next run requests the missing answers again
            return run
        publish(run.model_copy(update={"finished_at": time.time()}), deleted)
        with registry.writing() as session:
            context.check_lease(session)
            return nightly.finish_run(session, run.id)


def _run_stages(context: NightlyContext) -> list[NightlyStep]:
    """Runs all stages; returns the failed steps of adapters that were deleted during the run."""
    registry, run = context.registry, context.run
    if run.sources is None:
        _scan(context)
    with registry.reading() as session:
        adapters_with_data = {data.adapter for data in nightly.pending_data(session)}
    seen = adapters_with_data | {step.adapter for step in context.steps()}
    forget_older_steps(context)
    add_feedback(context)
    collect_all(context)
    try:
        for stage in (replay_all, train_all, evaluate_all, gate_all, promote_all):
            stage(context)
    except (Unavailable, SetupError) as error:
        context.interrupt(error)
        raise
    deleted = deleted_adapters(context, seen)
    for step in deleted:
        context.report(step)
    return deleted


def _scan(context: NightlyContext) -> None:
    """Scans the sources and records the result; a run that is killed before scans again, and adds nothing twice."""
    found = scan_sources(context.registry, context.definition, max_bytes=context.settings.serve.max_upload_bytes)
    with context.registry.writing() as session:
        context.check_lease(session)
        sources.record_scan(session, context.run.id, found)


def deleted_adapters(context: NightlyContext, seen: Collection[str]) -> list[NightlyStep]:
    """A failed step for each adapter that was deleted during the run, as its recorded steps were."""
    with context.registry.reading() as session:
        deleted = [adapter for adapter in sorted(seen) if not adapter_exists(session, adapter)]
    result = {"error": "The adapter was deleted during the nightly run.", "deleted": True}
    return [
        NightlyStep(run=context.run.id, adapter=adapter, step="collect", status=StepStatus.FAILED, result=result)
        for adapter in deleted
    ]
