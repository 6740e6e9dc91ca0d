"""The part of `loramill.Client` that is about data and jobs."""

from __future__ import annotations

import csv
import io
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar, Unpack
from urllib.parse import quote

from loramill.client.http import Transport, error_from_response, unexpected_response
from loramill.client.models import Checkpoint, Event, File, FileCheck, Job, MetricPoint, SubmittedJob, parse_object
from loramill.client.uploads import OnUpload, Source, Uploads
from loramill.data.ingest import Columns, PreparedSource, read_source
from loramill.errors import Forbidden, InvalidRequest, LoramillError, NotFound, NotRunning, Overloaded, Unavailable
from loramill.names import AdapterName, results_id
from loramill.submission.job_file import JobFileEntry, check_entries, raise_problems, read_jobs, request_body
from loramill.submission.options import JobOptionsDict, drop_none, read_options

#: Told of what is done: "uploading", "checking" or "submitting", how many are done, and of how many.
OnProgress = Callable[[str, int, int], None]

_P = ParamSpec("_P")
_T = TypeVar("_T")
#: Seconds for which `wait` and `events` bear with a gateway that is away.
_OUTAGE_SECONDS = 60.0

_PAGE_SIZE = 100
#: Jobs of one request: their files are tokenized while it is waited for.
_BATCH_SIZE = 100
_JOBS = "/v1/fine_tuning/jobs"
#: What is given in place of a job's id where an adapter is meant.
_ADAPTER_NAME = re.compile(r"[a-z0-9][\w.-]*/[a-z0-9][\w.@-]*")
_FILES = "/v1/files"


class JobsResource:
    """Data and jobs of a gateway, for `Client` to inherit."""

    url: str
    _wire: Transport

    def upload(
        self,
        data: Source,
        *,
        tenant: str | None = None,
        filename: str = "train.jsonl",
        columns: Columns = None,
        reuse: bool = False,
    ) -> File:
        """Uploads examples, which the gateway validates at once.

        Args:
            data: where they are.
            filename: names bytes.
            columns: the column of each field: {"prompt": "question", "completion": "answer"}; None: recognized.
            reuse: answer with the tenant's file of the same content, if it has one.

        Raises:
            DatasetInvalid: examples are wrong; the message gives file, line and field of every problem.
            InvalidRequest: the data can't be read.
        """
        if isinstance(data, File):
            return data
        if isinstance(data, bytes):
            data = PreparedSource(filename, data, "JSONL")
        elif not isinstance(data, PreparedSource):
            data = read_source(data, columns)
        form = {"purpose": "fine-tune", **({"reuse": "true"} if reuse else {})}
        upload = {"file": (data.name, data.content)}
        file = File.from_wire(self._wire.request_json("POST", _FILES, tenant=tenant, data=form, files=upload))
        return file.model_copy(update={"recognized": data.format, "warnings": (*data.warnings, *file.warnings)})

    def check(
        self,
        data: Source,
        *,
        tenant: str | None = None,
        columns: Columns = None,
        valid: bool = False,
        max_length: int | None = None,
        train_on: Literal["last", "all"] | None = None,
    ) -> FileCheck:
        """Describes what a job would train on, as the base's chat template renders it; nothing is stored.

        Args:
            data: where the examples are; not an uploaded file.
            columns: as `upload` takes them.
            valid: whether they are for validation, which has no minimum number.
            max_length, learn: as `submit` takes them.

        Raises:
            DatasetInvalid: as for `upload`, or examples are too few or too long for a job.
        """
        if isinstance(data, File) or (isinstance(data, str) and data.startswith("file-")):
            raise InvalidRequest("An uploaded file was checked when it was uploaded; give the data itself.")
        if isinstance(data, bytes):
            data = PreparedSource("train.jsonl", data, "JSONL")
        elif not isinstance(data, PreparedSource):
            data = read_source(data, columns)
        form = drop_none({"max_length": max_length, "train_on": train_on}) | {
            "use": "validation" if valid else "training"
        }
        upload = {"file": (data.name, data.content)}
        found = self._wire.request_json("POST", f"{_FILES}/check", tenant=tenant, data=form, files=upload)
        warnings = (*data.warnings, *filter(None, (found.get("status_details") or "").split("\n")))
        return parse_object(FileCheck, {**found, "recognized": data.format, "warnings": warnings})

    def files(self, tenant: str | None = None) -> Iterator[File]:
        """Uploaded files, newest first: a tenant's own; an admin's key sees those of `tenant`, or of all."""
        return (File.from_wire(row) for row in self._wire.paginate(_FILES, tenant=tenant))

    def file(self, file_id: str) -> File:
        """One uploaded file's description."""
        return File.from_wire(self._wire.request_json("GET", f"{_FILES}/{quote(file_id, safe='')}"))

    def file_content(self, file_id: str) -> Iterator[bytes]:
        """A file's bytes, piece by piece; a job's results file is CSV."""
        with self._wire.stream(f"{_FILES}/{quote(file_id, safe='')}/content") as content:
            yield from content

    def delete_file(self, file_id: str) -> None:
        """Forgets a file. Conflict: a job that hasn't ended, or a night to come, needs it."""
        self._wire.request_json("DELETE", f"{_FILES}/{quote(file_id, safe='')}")

    def submit(
        self,
        adapter: str,
        train: Source,
        *,
        valid: Source | None = None,
        columns: Columns = None,
        valid_columns: Columns = None,
        on_upload: OnUpload | None = None,
        **options: Unpack[JobOptionsDict],
    ) -> Job:
        """Submits a fine-tune job that makes a new version of `adapter`, and returns at once.

        Args:
            adapter: `tenant/adapter`; the adapter comes into being with its first job.
            train: examples to learn from.
            valid: examples to measure the loss on.
            columns: as `upload` takes it; also for `valid`, if it has these columns.
            valid_columns: for `valid`, if its columns differ.
            on_upload: called with each file that was uploaded.
            options: what the gateway would choose otherwise; `Job.spec` tells it all. The usual ones: epochs or steps
                (which win), batch_size, learning_rate, method ("lora", "dora", …), rank, alpha, targets ("all-linear",
                or names), max_length, start_from ("champion" or a version to go on from; else fresh), priority, seed,
                metadata. `loramill.submission.options.Options` and `loramill.types.JobSpec` describe all.

        Raises:
            InvalidRequest: an option or the data makes no sense; DoesNotFit if no GPU of the pool could hold the job.
            QuotaExceeded: the tenant has as many jobs waiting as it may have.
        """
        name = AdapterName.parse(adapter)
        said = read_options(options).to_request()
        with Uploads(self, on_upload) as uploads:
            request = {
                "training_file": uploads.train(train, name.tenant, columns),
                "validation_file": uploads.valid(valid, name.tenant, columns, valid_columns),
                "model": options.get("base") or self._served_base(),
                "suffix": name.adapter,
                **said,
            }
            return Job.from_wire(self._wire.request_json("POST", _JOBS, tenant=name.tenant, json=drop_none(request)))

    def submit_many(
        self,
        jobs: Path | str | Iterable[Mapping[str, Any]],
        *,
        defaults: Mapping[str, Any] | None = None,
        name: str = "",
        retry: bool = False,
        on_progress: OnProgress | None = None,
        on_upload: OnUpload | None = None,
    ) -> list[SubmittedJob]:
        """Submits many jobs; nothing is submitted unless all of them are in order.

        Called again after a crash, it submits what is missing: a job of the same adapter, data and options is known
        by its metadata `loramill_key`.

        Args:
            jobs: a file of jobs (TOML, JSONL, CSV or TSV), or mappings with `adapter`, `train`, perhaps `valid`,
                `columns` and `valid_columns`, and any option of `submit`.
            defaults: options of every job that doesn't say otherwise.
            name: another name makes other jobs of the same ones: all are submitted again.
            retry: submit those again that failed or were cancelled.
            on_upload: called with each file that was uploaded.

        Raises:
            InvalidRequest: something is wrong with some of them; the message has a line for each problem.
        """
        if isinstance(jobs, str | Path):
            rows: Iterable[tuple[str, Mapping[str, Any]]] = read_jobs(Path(jobs), defaults or {})
        else:
            rows = [(f"job {number}", {**(defaults or {}), **job}) for number, job in enumerate(jobs, start=1)]
        entries = check_entries(rows)
        tell = on_progress or (lambda what, done, total: None)
        self._check_tenants(entries)
        with Uploads(self, on_upload) as uploads:
            requests = self._upload_all(uploads, entries, name, tell)
            _refuse_duplicates(entries, requests)
            parts = [
                (entries[i : i + _BATCH_SIZE], requests[i : i + _BATCH_SIZE])
                for i in range(0, len(entries), _BATCH_SIZE)
            ]
            if len(parts) > 1:  # one request is all or nothing by itself
                checks = _with_progress(parts, "checking", tell)
                checked = [self._send_batch(*part, check_only=True, retry=retry) for part in checks]
                raise_problems([problem for problems, _ in checked for problem in problems])
            submitted: list[SubmittedJob] = []
            for part in _with_progress(parts, "submitting", tell):
                problems, done = self._send_batch(*part, check_only=False, retry=retry)
                raise_problems(problems, submitted=len(submitted))
                submitted += done
        return submitted

    def jobs(self, tenant: str | None = None) -> Iterator[Job]:
        """Jobs, newest first: a tenant's own; an admin's key sees those of `tenant`, or of all."""
        return (Job.from_wire(row) for row in self._wire.paginate(_JOBS, tenant=tenant, limit=_PAGE_SIZE))

    def job(self, job_id: str) -> Job:
        """One job as it is now."""
        return Job.from_wire(self._wire.request_json("GET", _job_path(job_id)))

    def cancel(self, job_id: str) -> Job:
        """Asks a job to stop; it publishes nothing from then on."""
        return Job.from_wire(self._wire.request_json("POST", _job_path(job_id, "/cancel")))

    def pause(self, job_id: str) -> Job:
        """Asks a job to wait, keeping what it has learnt so far."""
        return Job.from_wire(self._wire.request_json("POST", _job_path(job_id, "/pause")))

    def resume(self, job_id: str) -> Job:
        """Lets a paused job go on where it was."""
        return Job.from_wire(self._wire.request_json("POST", _job_path(job_id, "/resume")))

    def retry(self, job_id: str) -> Job:
        """Queues a failed or cancelled job again; it resumes from its last checkpoint if that still exists.

        Raises:
            Conflict: it neither failed nor was cancelled, or its data was deleted.
        """
        return Job.from_wire(self._wire.request_json("POST", _job_path(job_id, "/retry")))

    def checkpoints(self, job_id: str) -> list[Checkpoint]:
        """Where a job's weights were validated, the latest first; `chat` takes the `model` of those that are kept."""
        return [
            Checkpoint.from_wire(row)
            for row in self._wire.paginate(_job_path(job_id, "/checkpoints"), limit=_PAGE_SIZE)
        ]

    def metrics(self, job_id: str) -> list[MetricPoint]:
        """What was measured while a job trained, step by step."""
        content = b"".join(self.file_content(results_id(job_id))).decode()
        table = csv.DictReader(io.StringIO(content, newline=""))
        return [MetricPoint.model_validate({name: cell for name, cell in row.items() if cell}) for row in table]

    def events(self, job_id: str, *, follow: bool = False, poll_seconds: float = 1.0) -> Iterator[Event]:
        """A job's history, oldest first; `follow` waits for more, looking `every` so many seconds, until it ends."""
        last: str | None = None
        while True:
            final = not follow or self._retry_while_unavailable(self.job, job_id).status.final
            for event in self._retry_while_unavailable(self._events_after, job_id, last):
                last = event.id
                yield event
            if final:
                return
            time.sleep(poll_seconds)

    def wait(self, job_id: str, on_progress: Callable[[Job], None] | None = None, *, poll_seconds: float = 1.0) -> Job:
        """Waits until a job has succeeded; `on_progress` sees it as it is `every` so many seconds.

        Outlives a gateway that is away for up to a minute.

        Raises:
            JobError: it failed (the class tells how), or, as JobCancelled, it was cancelled.
        """
        while True:
            job = self._retry_while_unavailable(self.job, job_id)
            if on_progress is not None:
                on_progress(job)
            if (failure := job.failure) is not None:
                raise failure
            if job.status.final:
                return job
            time.sleep(poll_seconds)

    def _served_base(self) -> str:
        for model in self._wire.paginate("/v1/models"):
            if "/" not in str(model["id"]):
                return str(model["id"])
        raise unexpected_response(self.url, "it serves no base model")

    def _check_tenants(self, entries: Sequence[JobFileEntry]) -> None:
        """Refuses entries of tenants that don't exist, before anything is uploaded."""
        first = {entry.adapter.tenant: entry.where for entry in reversed(entries)}
        problems = []
        for tenant, where in reversed(first.items()):
            try:
                self._wire.request_json("GET", f"/v1/tenants/{quote(tenant, safe='')}")
            except NotFound as error:
                problems.append(f"{where}: {error.message} (`loramill tenant create {tenant}` makes it.)")
            except Forbidden:  # a tenant's key may not ask; its uploads will show it
                continue
        raise_problems(problems)

    def _upload_all(
        self, uploads: Uploads, entries: Sequence[JobFileEntry], name: str, tell: OnProgress
    ) -> list[dict[str, Any]]:
        """Uploads each source once for each tenant; returns what is asked of the gateway for each entry."""
        base = self._served_base()
        known: dict[tuple[object, ...], str | LoramillError | None] = {}
        problems: list[str] = []
        requests = []
        for entry in _with_progress(entries, "uploading", tell):
            tenant, columns, own = entry.adapter.tenant, entry.columns, entry.valid_columns
            train = _upload_once(known, uploads.train, entry.train, tenant, columns)
            valid = _upload_once(known, uploads.valid, entry.valid, tenant, columns, own)
            wrong = [found for found in (train, valid) if isinstance(found, LoramillError)]
            problems += dict.fromkeys(f"{entry.where}: {line}" for error in wrong for line in _problem_lines(error))
            if not wrong:
                requests.append(request_body(entry, train, valid, entry.options.base or base, name))
        raise_problems(problems)
        return requests

    def _send_batch(
        self, entries: Sequence[JobFileEntry], requests: Sequence[Mapping[str, Any]], *, check_only: bool, retry: bool
    ) -> tuple[list[str], list[SubmittedJob]]:
        """The problems of a part of the jobs; if there are none, and it isn't only a check, what was submitted."""
        body = {"jobs": requests, "check_only": check_only, "retry": retry}
        found = self._wire.request_json("POST", f"{_JOBS}/batch", json=body)["data"]
        errors = [(entry, each["error"]) for entry, each in zip(entries, found, strict=True) if each["error"]]
        problems = [
            f"{entry.where}: {line}"
            for entry, error in errors
            for line in _problem_lines(error_from_response(400, {"error": error}, self.url))
        ]
        if problems or check_only:
            return problems, []
        return [], [
            SubmittedJob(where=entry.where, job=Job.from_wire(each["job"]), new=each["new"])
            for entry, each in zip(entries, found, strict=True)
        ]

    def _events_after(self, job_id: str, last: str | None) -> list[Event]:
        fresh = []
        for row in self._wire.paginate(_job_path(job_id, "/events"), limit=_PAGE_SIZE):  # newest first
            if row.get("id") == last:
                break
            fresh.append(Event.from_wire(row))
        return fresh[::-1]

    def _retry_while_unavailable(self, ask: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        deadline = time.monotonic() + _OUTAGE_SECONDS
        while True:
            try:
                return ask(*args, **kwargs)
            except (NotRunning, Unavailable, Overloaded):
                if time.monotonic() > deadline:
                    raise
                time.sleep(1.0)


def _job_path(job_id: str, below: str = "") -> str:
    if _ADAPTER_NAME.fullmatch(job_id):
        raise InvalidRequest(
            f"'{job_id}' is the name of an adapter, not of a job: a job's id begins with ftjob-, and "
            "`loramill jobs` lists them."
        )
    return f"{_JOBS}/{quote(job_id, safe='')}{below}"


def _with_progress(items: Sequence[_T], what: str, tell: OnProgress) -> Iterator[_T]:
    for done, item in enumerate(items):
        tell(what, done, len(items))
        yield item
    tell(what, len(items), len(items))


def _upload_once(
    known: dict[tuple[object, ...], Any], upload: Callable[..., str | None], source: Any, *rest: Any
) -> Any:
    """The id of a source's uploaded file, or the error; remembered in `known`."""
    what = (source, *map(str, rest))
    if what not in known:
        try:
            known[what] = upload(source, *rest)
        except (NotRunning, Unavailable):
            raise
        except LoramillError as error:
            known[what] = error
    return known[what]


def _problem_lines(error: LoramillError) -> Sequence[str]:
    """The lines of an error that say something by themselves."""
    problems: Sequence[str] = getattr(error, "problems", ())
    return problems or error.message.split("\n")


def _refuse_duplicates(entries: Sequence[JobFileEntry], requests: Sequence[Mapping[str, Any]]) -> None:
    first: dict[str, str] = {}
    raise_problems(
        [
            f"{entry.where}: it asks for the same as {where}; remove one, or give it another seed."
            for entry, request in zip(entries, requests, strict=True)
            if (where := first.setdefault(request["metadata"]["loramill_key"], entry.where)) != entry.where
        ]
    )
