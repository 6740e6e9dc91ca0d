"""`loramill submit` and `loramill jobs`: fine-tune jobs."""

from __future__ import annotations

from itertools import islice
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from loramill.cli import show
from loramill.client import Client
from loramill.names import AdapterName
from loramill.views import Event, File, Job

jobs = typer.Typer(cls=show.ListByDefault, help="Fine-tune jobs; alone it lists them.")

Train = Annotated[str, typer.Option(metavar="FILE", help="JSONL examples to learn from, or an uploaded file's id.")]
Valid = Annotated[str | None, typer.Option(metavar="FILE", help="JSONL examples to measure on, or a file's id.")]
Adapter = Annotated[str, typer.Argument(metavar="TENANT/ADAPTER", help="Such as acme/support.", show_default=False)]
JobId = Annotated[str, typer.Argument(metavar="JOB", help="The job's id (ftjob-…).", show_default=False)]
Tenant = Annotated[str | None, typer.Option("--tenant", help="Of this tenant only (for an admin's key).")]


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    app.command(rich_help_panel="Fine-tuning")(submit)
    app.add_typer(jobs, name="jobs", rich_help_panel="Fine-tuning")


def _targets(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(name.strip() for name in text.split(","))


def submit(
    adapter: Adapter,
    *,
    train: Train,
    valid: Valid = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the adapter.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Scale of the adapter: alpha / rank.")] = None,
    rslora: Annotated[bool | None, typer.Option(help="Scale by alpha / sqrt(rank).")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the examples, instead of --steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples a step.")] = None,
    dropout: Annotated[float | None, typer.Option(help="Dropout before the adapter, 0 to 1.")] = None,
    targets: Annotated[
        str | None, typer.Option(metavar="LIST", help="Linear layers, with commas, such as q_proj,v_proj.")
    ] = None,
    warmup_ratio: Annotated[float | None, typer.Option(help="Part of the steps that warms up, 0 to 1.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Weight decay.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens of the longest example.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the run.")] = None,
    start_from: Annotated[
        str | None, typer.Option(metavar="VERSION", help='Go on from "champion" or a version; else fresh.')
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Show progress until the job ends.")] = False,
    json: show.AsJson = False,
) -> None:
    """Upload examples, submit a fine-tune job, and print its id.

    What isn't given is chosen by the gateway; `loramill jobs show JOB` tells it all.
    """
    chosen = _targets(targets)
    tenant = AdapterName.parse(adapter).tenant
    with Client() as client:
        job = client.submit(
            adapter,
            upload(client, train, tenant),
            valid=None if valid is None else upload(client, valid, tenant),
            rank=rank,
            alpha=alpha,
            rslora=rslora,
            learning_rate=lr,
            steps=steps,
            epochs=epochs,
            batch_size=batch_size,
            dropout=dropout,
            targets=chosen,
            warmup_ratio=warmup_ratio,
            weight_decay=weight_decay,
            max_length=max_length,
            seed=seed,
            start_from=start_from,
        )
        if not json:
            show.line(job.id)
        if wait:
            job = _watch(client, job)
            show.say(f"{job.model} is ready: `loramill chat {job.model}`")
        elif not json:
            show.say(f"Queued; `loramill jobs events -f {job.id}` follows it.")
    if json:
        show.as_json(job)


def upload(client: Client, source: str, tenant: str) -> File | str:
    """Uploads a file, saying what the gateway warns of; an uploaded file's id stays as it is."""
    if source.startswith("file-"):
        return source
    file = client.upload(source, tenant=tenant)
    for warning in file.warnings:
        show.say(f"Warning: {warning}", style="yellow")
    return file


def _watch(client: Client, job: Job) -> Job:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=show.screen(stderr=True)) as progress:
        task = progress.add_task(f"{job.adapter} {job.status}", total=job.steps)

        def advance(now: Job) -> None:
            progress.update(task, completed=now.step, description=f"{now.adapter} {now.status}")

        return client.wait(job.id, advance)


@jobs.command("list")
def list_jobs(
    tenant: Tenant = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="At most so many, the newest.")] = 50,
    json: show.AsJson = False,
) -> None:
    """List jobs, newest first."""
    with Client() as client:
        found = list(islice(client.jobs(tenant), limit + 1))
    if json:
        return show.as_json(found[:limit])
    show.table(
        ("JOB", "ADAPTER", "STATUS", "STEP", "RESULT", "SUBMITTED"),
        (
            (
                job.id,
                job.adapter,
                show.status(job.status),
                f"{job.step}/{job.steps}",
                show.short(job.model and job.model.partition("@")[2]),
                show.ago(job.created_at),
            )
            for job in found[:limit]
        ),
        empty="No jobs yet: `loramill submit TENANT/ADAPTER --train FILE` submits one.",
    )
    if len(found) > limit:
        show.say(f"There are more than {limit}: --limit shows them.")
    return None


@jobs.command("show")
def show_job(job_id: JobId, json: show.AsJson = False) -> None:
    """Show one job: its state and its spec."""
    with Client() as client:
        job = client.job(job_id)
    if json:
        return show.as_json(job)
    pairs: list[tuple[str, show.Cell]] = [
        ("job", job.id),
        ("adapter", job.adapter),
        ("status", show.status(job.status)),
        ("step", f"{job.step}/{job.steps}"),
        ("attempt", str(job.attempt)),
        ("submitted", show.ago(job.created_at)),
    ]
    if job.finished_at:
        pairs.append(("finished", show.ago(job.finished_at)))
    if job.model:
        pairs.append(("result", job.model))
    if job.error:
        pairs.append(("error", f"{job.error_code}: {job.error}"))
    pairs += [(f"spec.{name}", _value(value)) for name, value in job.spec.items()]
    return show.facts(pairs)


def _value(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "-" if value is None else str(value)


@jobs.command("events")
def events(
    job_id: JobId,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Wait for more until the job ends.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON: a list, or with -f an object a line.")] = False,
) -> None:
    """Show a job's history, oldest first."""
    with Client() as client:
        history = client.events(job_id, follow=follow)
        if json and not follow:
            return show.as_json(history)
        for event in history:
            show.line(event.model_dump_json() if json else _told(event))
    return None


def _told(event: Event) -> str:
    numbers = " ".join(f"{name}={value}" for name, value in event.data.items()) if event.kind == "metrics" else ""
    return f"{show.clock(event.created_at)}  {event.level:<5}  {event.message}  {numbers}".rstrip()


@jobs.command("cancel")
def cancel(job_id: JobId, json: show.AsJson = False) -> None:
    """Ask a job to stop; it publishes nothing from then on."""
    with Client() as client:
        job = client.cancel(job_id)
    if json:
        show.as_json(job)
    else:
        show.say(f"{job.id} is asked to stop (now {job.status}).")
