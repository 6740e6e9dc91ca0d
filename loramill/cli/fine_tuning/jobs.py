"""`loramill jobs`: list, show and control fine-tune jobs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Annotated, Any

import typer

from loramill.cli.arguments import JobArgument, JobLimitOption, JobsArgument, JsonFlag, TenantOption
from loramill.cli.format import (
    Cell,
    four_digits,
    local_time,
    print_fields,
    print_json,
    print_line,
    print_message,
    print_table,
    short_version,
    styled_status,
    time_ago,
)
from loramill.client import Client
from loramill.client.jobs import JobsResource
from loramill.client.models import Event, Job
from loramill.durations import rounded_duration
from loramill.errors import Conflict, NotFound
from loramill.types import SweepCandidate

#: Fields of a spec that are shown under other names.
_HIDDEN_SPEC_FIELDS = ("base", "adapter", "train", "candidates")


def list_jobs(
    tenant: TenantOption = None,
    limit: JobLimitOption = 50,
    json: JsonFlag = False,
) -> None:
    """List jobs, newest first."""
    with Client() as client:
        found = list(islice(client.jobs.list(tenant), limit + 1))
    if json:
        return print_json(found[:limit])
    print_table(
        ("JOB", "ADAPTER", "STATUS", "STEP", "RESULT", "SUBMITTED"),
        (
            (
                job.id,
                job.adapter,
                styled_status(job.status if job.waits_for is None else f"{job.status}, waits for {job.waits_for}"),
                f"{job.step}/{job.steps}",
                short_version(job.model and job.model.partition("@")[2]),
                time_ago(job.created_at),
            )
            for job in found[:limit]
        ),
        empty="No jobs yet: `loramill submit TENANT/ADAPTER --train FILE` submits one.",
    )
    if len(found) > limit:
        print_message(f"There are more than {limit} jobs; use --limit to show more.")
    return None


def show_job(job_id: JobArgument, json: JsonFlag = False) -> None:
    """Show the status and the options of a job."""
    with Client() as client:
        job = client.jobs.get(job_id)
    if json:
        return print_json(job)
    print_fields(_job_fields(job))
    if job.sweep:
        print_line("")
        _print_candidates(job.sweep, job.status)
    return None


def _print_candidates(candidates: Sequence[SweepCandidate], status: str) -> None:
    # A candidate that was not compared yet trains only while its job runs.
    states = {"training": "training" if status == "running" else status}
    names = list(candidates[0].values)
    print_table(
        ("CANDIDATE", *(name.upper() for name in names), "STEP", "VALIDATION LOSS", "LOWEST", "STATE"),
        (
            (
                str(each.number),
                *(_format_value(each.values[name]) for name in names),
                str(each.step),
                _format_loss(each.valid_loss),
                _format_loss(each.best_valid_loss),
                f"{each.state}: {each.error}" if each.error else states.get(each.state, each.state),
            )
            for each in candidates
        ),
        empty="",
    )


def _job_fields(job: Job) -> list[tuple[str, Cell]]:
    pairs: list[tuple[str, Cell]] = [
        ("job", job.id),
        ("adapter", job.adapter),
        ("status", styled_status(job.status)),
        ("step", f"{job.step}/{job.steps}"),
        ("attempt", str(job.attempt)),
        ("submitted", time_ago(job.created_at)),
    ]
    pairs += [
        (name, _format_value(value))
        for name, value in (
            ("base", job.base),
            ("priority", job.priority or None),
            ("executor", job.executor),
            ("training loss", job.loss),
            ("validation loss", job.valid_loss),
            ("tokens", job.trained_tokens),
        )
        if value is not None
    ]
    if job.waits_for:
        pairs.append(("waits for", job.waits_for))
    if job.estimated_finish:
        pairs.append(("finishes in", rounded_duration(job.estimated_finish - time.time())))
    if job.finished_at:
        pairs.append(("finished", time_ago(job.finished_at)))
    if job.model:
        pairs.append(("result", job.model))
    if job.error:
        pairs.append(("error", f"{job.error_code}: {job.error}"))
    if job.training_file:
        pairs.append(("training file", job.training_file))
    pairs += [
        (f"spec.{name}", _format_spec_field(name, value))
        for name, value in job.spec.items()
        if name not in _HIDDEN_SPEC_FIELDS
    ]
    return pairs


def _format_spec_field(name: str, value: object) -> str:
    if name == "eval_every" and value is None:
        return "at each checkpoint"
    return short_version(str(value)) if name == "start_from" and value else _format_value(value)


def _format_value(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{key}={each}" for key, each in value.items()) or "-"
    if isinstance(value, float):
        return four_digits(value)
    return "-" if value is None else str(value)


def events(
    job_id: JobArgument,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Wait for further events until the job ends.")] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print JSON: a list, or with --follow one object per line.")
    ] = False,
) -> None:
    """Show a job's history, oldest first."""
    with Client() as client:
        history = client.jobs.events(job_id, follow=follow)
        if json and not follow:
            return print_json(history)
        for event in history:
            print_line(event.model_dump_json() if json else _format_event(event))
    return None


def _format_event(event: Event) -> str:
    numbers = _format_metrics(event.data) if event.kind == "metrics" else ""
    return f"{local_time(event.created_at)}  {event.level:<5}  {event.message}  {numbers}".rstrip()


def _format_metrics(data: Mapping[str, Any]) -> str:
    """Formats measurements that the message lacks; each validation once (OpenAI has two names for it)."""
    in_message = ("step", "total_steps", "train_loss")
    shown = {
        name: value for name, value in data.items() if name not in in_message and not name.startswith("full_valid_")
    }
    return " ".join(f"{name}={_format_value(value)}" for name, value in shown.items())


def checkpoints(job_id: JobArgument, json: JsonFlag = False) -> None:
    """List a job's checkpoints. `loramill chat` accepts the MODEL of a checkpoint that is still stored."""
    with Client() as client:
        found = client.jobs.checkpoints(job_id)
    if json:
        return print_json(found)
    return print_table(
        ("STEP", "VALIDATION LOSS", "TRAINING LOSS", "WRITTEN", "MODEL"),
        (
            (
                str(each.step),
                _format_loss(each.metrics.get("valid_loss")),
                _format_loss(each.metrics.get("train_loss")),
                time_ago(each.created_at),
                each.model or "-",
            )
            for each in found
        ),
        empty=f"{job_id} has no checkpoints yet.",
    )


def cancel(job_ids: JobsArgument, json: JsonFlag = False) -> None:
    """Cancel jobs. A cancelled job publishes no version."""
    _change(job_ids, JobsResource.cancel, "will be cancelled", json=json)


def pause(job_ids: JobsArgument, json: JsonFlag = False) -> None:
    """Pause jobs. Their progress is kept."""
    _change(job_ids, JobsResource.pause, "will be paused", json=json)


def resume(job_ids: JobsArgument, json: JsonFlag = False) -> None:
    """Resume paused jobs."""
    _change(job_ids, JobsResource.resume, "resumes", json=json)


def retry(job_ids: JobsArgument, json: JsonFlag = False) -> None:
    """Queue failed or cancelled jobs again. They resume from their last checkpoint if it still exists.

    Checkpoints of a failed job are kept for a week; those of a cancelled job are deleted immediately.
    """
    _change(job_ids, JobsResource.retry, "is queued again", json=json)


def _change(job_ids: Sequence[str], change: Callable[[JobsResource, str], Job], outcome: str, *, json: bool) -> None:
    """Changes each job; prints the errors of those that can't be changed, and exits with 1 for them."""
    changed, refused = [], False
    with Client() as client:
        for job_id in job_ids:
            try:
                changed.append(change(client.jobs, job_id))
            except (Conflict, NotFound) as error:
                refused = True
                print_message(error.message, style="red")
    if json:
        print_json(changed)
    else:
        for job in changed:
            print_message(f"{job.id} {outcome} (now {job.status}).")
    if refused:
        raise typer.Exit(1)


def _format_loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
