"""The demo, from data to measured adapters: `make demo`, or `python examples/demo.py [FOLDER …]`.

Starts `loramill up` on a home of its own, gives each folder of examples a tenant with a key and a
fine-tune job, sends all test questions to base and adapters through the `openai` client, and ends with a
nightly run: one tenant with new data, one with spoiled data. Exit status 1 if an adapter does not beat the
base and every other adapter on its own tenant's questions, or the nightly run promotes spoiled data.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from openai import AsyncOpenAI, DefaultAsyncHttpxClient
from report import Curve, NightlyResult, Row, Run, Sample, best, write_report
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from loramill import Client
from loramill.client.models import Job
from loramill.data.examples import Example, read_examples
from loramill.data.tokenizer import ChatTokenizer
from loramill.errors import LoramillError, NotRunning, Unavailable
from loramill.models.catalog import Base, find_base
from loramill.pipelines.nightly import run as nightly
from loramill.pipelines.nightly.outcome import Outcome, Verdict, describe, outcomes
from loramill.pipelines.nightly.questions import EvalAnswer, EvalQuestion, answer_all, build_questions
from loramill.pipelines.nightly.text_metrics import score
from loramill.registry import Registry
from loramill.registry import nightly as records
from loramill.settings import Settings
from loramill.submission.options import JobOptionsDict

T = TypeVar("T")
FOLDER = Path(__file__).parent
#: The example tenant whose new data are an accident (see README.md).
SPOILED = "copperline"
#: Maximum number of new examples from the user's own tenants, so that the nightly run stays short.
MAX_NEW_EXAMPLES = 200
#: Answers of each tenant that the report shows.
SAMPLES = 4
RECIPE: JobOptionsDict = {"rank": 16, "learning_rate": 2e-3, "batch_size": 8, "steps": 60, "checkpoint_every": 15}
console = Console()


@dataclass(frozen=True)
class Tenant:
    """A folder of examples, and the new data for the nightly run."""

    name: str
    train: bytes
    valid: bytes
    test: tuple[Example, ...]
    new: bytes | None = None
    new_valid: bytes | None = None
    spoiled: bool = False

    @property
    def model(self) -> str:
        """The adapter's name in the API."""
        return f"{self.name}/assistant"


class Up:
    """A `loramill up` process, which is started again if it is killed."""

    command = (sys.executable, "-m", "loramill.cli", "up")

    def __init__(self) -> None:
        self.process = subprocess.Popen(self.command)

    def revive(self) -> bool:
        """Restarts the process if a signal ended it; returns False if it exited by itself, after printing an error."""
        ended = self.process.poll()
        if ended is not None and ended < 0:
            self.process = subprocess.Popen(self.command)
        return ended is None or ended < 0

    def stop(self) -> None:
        """Ends it cleanly."""
        self.process.terminate()
        self.process.wait()


def main() -> int:
    """Runs the demo; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, help="folders with train, valid and test.jsonl")
    parser.add_argument("--home", type=Path, default=Path(".demo"), help="emptied first")
    parser.add_argument("--report", type=Path, default=Path("demo-report.html"))
    options = parser.parse_args()
    if options.home.exists() and any(options.home.iterdir()) and not (options.home / "up.lock").exists():
        parser.error(f"{options.home} holds something else than a demo's home; name another folder")
    begun = time.monotonic()
    tenants = own_tenants(options.folders) if options.folders else example_tenants()
    with running(options.home.absolute()) as (client, up):
        submit_all(client, tenants)
        runs = watch_jobs(client, up)
        rows, samples = compare(client, tenants)
        console.print(comparison(rows))
        nightly_results = run_nightly_pipeline(client, tenants)
    seconds = time.monotonic() - begun
    base = served_base().name
    write_report(
        options.report,
        base=base,
        rows=rows,
        runs=runs,
        samples=samples,
        nightly_results=nightly_results,
        seconds=seconds,
    )
    console.print(f"{seconds / 60:.1f} minutes; report: {options.report}")
    losers = [row.tenant for row in rows if not row.wins]
    if losers:
        console.print(f"[red]Not the best on its own questions: {', '.join(losers)}[/red]")
    spoiled = [line.adapter for line in nightly_results if line.spoiled and line.promoted]
    if spoiled:
        console.print(f"[red]Promoted on spoiled data: {', '.join(spoiled)}[/red]")
    return 1 if losers or spoiled else 0


def example_tenants() -> list[Tenant]:
    """Reads the tenants next to this file, two of them with new data."""
    return [read_tenant(folder, FOLDER / "new_data" / folder.name) for folder in sorted((FOLDER / "tenants").iterdir())]


def own_tenants(folders: list[Path]) -> list[Tenant]:
    """Reads the user's tenants. A third of the first one's data is new; the second one's new data is spoiled."""
    tenants = [read_tenant(folder, folder / "new") for folder in folders]
    first = tenants[0].train.splitlines(keepends=True)
    kept = len(first) * 2 // 3
    tenants[0] = replace(tenants[0], train=b"".join(first[:kept]), new=b"".join(first[kept:][:MAX_NEW_EXAMPLES]))
    if len(tenants) > 1:
        tenants[1] = replace(tenants[1], new=mixed_up(tenants[1].train.splitlines()[:MAX_NEW_EXAMPLES]), spoiled=True)
    return tenants


def read_tenant(folder: Path, new_folder: Path) -> Tenant:
    """Reads a folder's three files, and its new data if there is some."""
    test = read_examples((folder / "test.jsonl").read_bytes(), str(folder / "test.jsonl"))
    new, new_valid = new_folder / "train.jsonl", new_folder / "valid.jsonl"
    return Tenant(
        name=folder.resolve().name.lower(),
        train=(folder / "train.jsonl").read_bytes(),
        valid=(folder / "valid.jsonl").read_bytes(),
        test=test.examples,
        new=new.read_bytes() if new.exists() else None,
        new_valid=new_valid.read_bytes() if new_valid.exists() else None,
        spoiled=folder.name == SPOILED and new.exists(),
    )


def mixed_up(lines: list[bytes]) -> bytes:
    """A join that was off by one: each question with the answer of the next."""
    rows = [json.loads(line) for line in lines]
    answers = [row["messages"][-1] for row in rows]
    for row, answer in zip(rows, answers[1:] + answers[:1], strict=True):
        row["messages"][-1] = answer
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


@contextlib.contextmanager
def running(home: Path) -> Iterator[tuple[Client, Up]]:
    """Runs `loramill up` on an emptied home and a free port, and yields an admin's client and the process."""
    if home.exists():
        environment = {**os.environ, "LORAMILL_HOME": str(home)}
        subprocess.run([*Up.command[:-1], "down"], env=environment, capture_output=True, check=True)
        shutil.rmtree(home)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {
        "LORAMILL_HOME": str(home),
        "LORAMILL_SERVE__PORT": str(port),
    }
    up = Up()
    try:
        yield wait_until_up(up), up
    finally:
        up.stop()


def wait_until_up(up: Up) -> Client:
    """Waits for the gateway; `up` prints its progress and errors itself."""
    settings = Settings.load()
    while up.revive():
        if settings.admin_key_file.exists() and (client := Client()).is_ready():
            return client
        time.sleep(0.5)
    raise SystemExit(1)


def submit_all(client: Client, tenants: list[Tenant]) -> None:
    """Creates the tenants, a key for each, and with that key its fine-tune job."""
    for tenant in tenants:
        client.tenants.create(tenant.name)
        key = client.keys.create(tenant.name).key
        with Client(client.url, key) as own:
            job = own.jobs.submit(tenant.model, tenant.train, valid=tenant.valid, **RECIPE)
        console.print(f"{tenant.model}: {len(tenant.train.splitlines())} examples, job {job.id}")


def watch_jobs(client: Client, up: Up) -> list[Run]:
    """Shows the jobs while they train; returns their results, by adapter."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        bars = {job.id: progress.add_task(job.adapter, total=job.steps, note="queued") for job in client.jobs.list()}
        waiting = set(bars)
        while waiting:
            for job in retry_while_away(lambda: list(client.jobs.list()), up):
                progress.update(bars[job.id], completed=job.step, note=job.status.value)
                if job.failure is not None:
                    raise job.failure
                if job.status.final:
                    waiting.discard(job.id)
            time.sleep(1.0)
    return sorted((trained(client, job) for job in client.jobs.list()), key=lambda run: run.adapter)


def trained(client: Client, job: Job) -> Run:
    """The result of a finished job."""
    return Run(
        adapter=job.adapter,
        version=(job.model or "").partition("@")[2],
        steps=job.steps,
        tokens=job.trained_tokens or 0,
        seconds=(job.finished_at or 0.0) - (job.started_at or 0.0),
        curve=loss_curve(client, job.id),
    )


def retry_while_away(ask: Callable[[], T], up: Up) -> T:
    """Retries while the gateway is unreachable and `up` can restart it."""
    while True:
        try:
            return ask()
        except (NotRunning, Unavailable):
            if not up.revive():
                raise
            time.sleep(1.0)


def loss_curve(client: Client, job: str) -> Curve:
    """A job's training and validation losses by step; a repeated step counts once, as it was last."""
    metrics = [event.data for event in client.jobs.events(job) if event.kind == "metrics"]
    return Curve(
        train={point["step"]: point["train_loss"] for point in metrics},
        valid={point["step"]: point["valid_loss"] for point in metrics if "valid_loss" in point},
    )


def compare(client: Client, tenants: list[Tenant]) -> tuple[list[Row], list[Sample]]:
    """Asks every tenant's test questions of the base, its own adapter and all the others, mixed in the same batches."""
    base = next(name for name in client.models() if "/" not in name)
    models = [base, *(tenant.model for tenant in tenants)]
    cells = [(tenant, model) for tenant in tenants for model in models]
    tokenizer = ChatTokenizer.load(served_base().folder)
    answers = iter(ask_with_bar([q for tenant, model in cells for q in build_questions(model, tenant.test, tokenizer)]))
    replies = {(tenant.name, model): [next(answers) for _ in tenant.test] for tenant, model in cells}
    rows, samples = [], []
    for tenant in tenants:
        references = [example.completion for example in tenant.test]
        scores = {model: score([each.text for each in replies[tenant.name, model]], references) for model in models}
        others = best({model: scores[model] for model in models[1:] if model != tenant.model} or {base: scores[base]})
        rows.append(Row(tenant.name, scores[base], scores[tenant.model], others, scores[others[0]]))
        samples += [
            Sample(tenant.name, example.messages[-2]["content"], reference, own, plain)
            for example, reference, own, plain in zip(
                tenant.test, references, replies[tenant.name, tenant.model], replies[tenant.name, base], strict=True
            )
        ][:: max(1, len(references) // SAMPLES)]
    return rows, samples


def ask_with_bar(questions: list[EvalQuestion]) -> list[EvalAnswer]:
    """Asks through the unmodified `openai` client, showing how many answers are in."""
    settings = Settings.load()
    key = settings.admin_key_file.read_text().strip()
    direct = DefaultAsyncHttpxClient(trust_env=False)  # a proxy can't reach this machine's loopback
    openai = AsyncOpenAI(base_url=f"{settings.gateway}/v1", api_key=key, max_retries=8, timeout=600, http_client=direct)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("questions answered", total=len(questions))
        answers = answer_all(openai, questions, report=lambda done: progress.update(bar, completed=done))
    return [answered(answer) for answer in answers]


def answered(answer: EvalAnswer | LoramillError) -> EvalAnswer:
    """The answer to a question; raises why there is none."""
    if isinstance(answer, LoramillError):
        raise answer
    return answer


def served_base() -> Base:
    """The base that the demo's gateway serves."""
    settings = Settings.load()
    return find_base(settings.base, settings.cache, settings.quantization)


def comparison(rows: list[Row]) -> Table:
    """The table that the demo ends with."""
    table = Table(title="Exact match on the tenants' own test questions")
    table.add_column("tenant")
    for heading in ("questions", "base", "own adapter", "best other adapter"):
        table.add_column(heading, justify="right")
    for row in rows:
        own = f"[{'green' if row.wins else 'red'}]{row.own.exact_match:.2f}[/]"
        other = f"{row.other.exact_match:.2f} ({row.other_name})"
        table.add_row(row.tenant, str(row.own.examples), f"{row.base.exact_match:.2f}", own, other)
    return table


def run_nightly_pipeline(client: Client, tenants: list[Tenant]) -> list[NightlyResult]:
    """Adds the new data and starts a nightly run; then asks the endpoints which version answers."""
    fed = [tenant for tenant in tenants if tenant.new is not None]
    before = {tenant.model: client.adapters.get(tenant.model).champion for tenant in fed}
    for tenant in fed:
        client.adapters.add_data(tenant.model, tenant.new or b"", valid=tenant.new_valid)
        console.print(f"{tenant.model}: {len((tenant.new or b'').splitlines())} new examples for the nightly run")
    settings = Settings.load()
    registry = Registry.open(settings.database, settings.artifacts)
    with console.status("The nightly run begins…") as status:
        run = nightly.run_nightly(registry, settings, report=lambda step: status.update(f"{describe(step)}…"))
    with registry.reading() as session:
        steps = records.list_steps(session, run.id)
    found = {outcome.adapter: outcome for outcome in outcomes(steps)}
    scores = {step.adapter: step.result["slices"] for step in steps if step.step == "evaluate"}
    lines = [
        nightly_result(tenant, found[tenant.model], scores[tenant.model], before[tenant.model], client)
        for tenant in fed
    ]
    console.print(nightly_table(lines))
    for line in lines:
        now = f"after {line.before:.12}" if line.promoted else "as before"
        console.print(f"{line.adapter}: {line.reason}; {line.champion:.12} answers, {now}.")
    return lines


def nightly_table(lines: list[NightlyResult]) -> Table:
    """Token F1 of the three candidates on each held-out slice, and what the gate decided."""
    table = Table(title="The nightly run: token F1 on held-out examples")
    for heading in ("tenant", "slice", "base", "champion", "challenger", "gate"):
        table.add_column(heading, justify="right" if heading in ("base", "champion", "challenger") else "left")
    for line in lines:
        decision = "[green]promoted[/]" if line.promoted else "[yellow]held[/]"
        for number, (part, roles) in enumerate(line.scores.items()):
            scores = [f"{roles[role]['token_f1']:.2f}" for role in ("base", "champion", "challenger")]
            first = number == 0
            table.add_row(line.adapter.split("/")[0] if first else "", part, *scores, decision if first else "")
    return table


def nightly_result(
    tenant: Tenant, outcome: Outcome, scores: dict[str, dict[str, Any]], before: str | None, client: Client
) -> NightlyResult:
    """The nightly run's outcome for one adapter, and the version that its endpoint answers with now."""
    answer = client.openai().chat.completions.with_raw_response.create(
        model=tenant.model, messages=[{"role": "user", "content": "Hello"}], max_tokens=1
    )
    return NightlyResult(
        adapter=tenant.model,
        spoiled=tenant.spoiled,
        promoted=outcome.verdict is Verdict.PROMOTED,
        reason=outcome.reason,
        before=before or "",
        champion=answer.headers["x-loramill-version"],
        scores=scores,
    )


if __name__ == "__main__":
    sys.exit(main())
