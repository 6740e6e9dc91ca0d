"""`client.jobs`: fine-tune jobs."""

from __future__ import annotations

import csv
import io
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, Unpack
from urllib.parse import quote

from loramill.client.http import error_from_response, unexpected_response
from loramill.client.models import Checkpoint, Event, Job, MetricPoint, SubmittedJob
from loramill.client.uploads import OnUpload, Source, Uploads
from loramill.data.ingest import Columns
from loramill.errors import Forbidden, InvalidRequest, LoramillError, NotFound, NotRunning, Overloaded, Unavailable
from loramill.names import AdapterName, results_id
from loramill.retry import retry_while_unavailable
from loramill.submission.job_file import JobFileEntry, check_entries, raise_problems, read_jobs, request_body
from loramill.submission.options import JobOptionsDict, drop_none, read_options

if TYPE_CHECKING:
    from loramill.client.files import FilesResource
    from loramill.client.http import Transport

#: Called with the stage ("uploading", "checking" or "submitting"), the number of jobs done, and the total.
OnProgress = Callable[[str, int, int], None]

_T = TypeVar("_T")
#: How long `wait` and `events` retry while the gateway is unreachable.
_OUTAGE_SECONDS = 60.0

_PAGE_SIZE = 100
#: Jobs per request; the gateway tokenizes their files before it answers.
_BATCH_SIZE = 100
_JOBS = "/v1/fine_tuning/jobs"
#: Matches the name of an adapter, given by mistake in place of a job's id.
_ADAPTER_NAME = re.compile(r"[a-z0-9][\w.-]*/[a-z0-9][\w.@-]*")


class JobsResource:
    """Fine-tune jobs of a gateway."""

    def __init__(self, transport: Transport, files: FilesResource) -> None:
        self._transport = transport
        self._files = files

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
        """Submits a fine-tune job that creates a new version of an adapter, and returns at once.

        Args:
            adapter: `tenant/adapter`; the adapter is created with its first job.
            train: Examples to train on.
            valid: Examples to measure the validation loss on.
            columns: Column of each field, such as {"prompt": "question", "completion": "answer"}; also for `valid` if
                it has these columns. Default: detected.
            valid_columns: Columns of `valid`, if they differ.
            on_upload: Called with each uploaded file.
            options: Options of the job; the gateway fills in defaults for the rest, which `Job.spec` shows. The usual
                ones are epochs or steps (steps win), batch_size, learning_rate, method ("lora", "dora", …), rank,
                alpha, targets ("all-linear", or names), max_length, start_from ("champion" or a version to continue
                from), sweep (values of options to choose from, such as {"rank": [8, 32]}), priority, seed and
                metadata. `loramill.submission.options.JobOptions` describes all of them.

        Raises:
            InvalidRequest: An option or the data is invalid. DoesNotFit: no GPU of the pool can hold the job.
            QuotaExceeded: The tenant has the maximum number of waiting jobs.
        """
        name = AdapterName.parse(adapter)
        body = read_options(options).to_request()
        with Uploads(self._files, on_upload) as uploads:
            request = {
                "training_file": uploads.train(train, name.tenant, columns),
                "validation_file": uploads.valid(valid, name.tenant, columns, valid_columns),
                "model": options.get("base") or self._served_base(),
                "suffix": name.adapter,
                **body,
            }
            response = self._transport.request_json("POST", _JOBS, tenant=name.tenant, json=drop_none(request))
        return Job.from_wire(response)

    def submit_many(
        self,
        jobs: Path | str | Iterable[Mapping[str, Any]],
        *,
        defaults: Mapping[str, Any] | None = None,
        name: str = "",
        retry: bool = False,
        on_progress: OnProgress | None = None,
        on_upload: OnUpload | None = None,
    ) -> Sequence[SubmittedJob]:
        """Submits many jobs. Nothing is submitted unless all of them are valid.

        Called again after a crash, it submits only the jobs that are missing: the metadata `loramill_key` identifies
        a job of the same adapter, data and options.

        Args:
            jobs: A file of jobs (TOML, JSONL, CSV or TSV), or mappings with `adapter`, `train`, optionally `valid`,
                `columns` and `valid_columns`, and any option of `submit`.
            defaults: Options of every job that does not set them itself.
            name: Part of the identity of the jobs: with another name, the same jobs are submitted again.
            retry: Submit failed and cancelled jobs again.
            on_progress: Called as the jobs are uploaded, checked and submitted.
            on_upload: Called with each uploaded file.

        Raises:
            InvalidRequest: Some jobs are invalid; the message has a line per problem.
        """
        if isinstance(jobs, str | Path):
            rows: Iterable[tuple[str, Mapping[str, Any]]] = read_jobs(Path(jobs), defaults or {})
        else:
            rows = [(f"job {number}", {**(defaults or {}), **job}) for number, job in enumerate(jobs, start=1)]
        entries = check_entries(rows)
        report = on_progress or (lambda stage, done, total: None)
        self._check_tenants(entries)
        with Uploads(self._files, on_upload) as uploads:
            requests = self._upload_all(uploads, entries, name, report)
            _refuse_duplicates(entries, requests)
            starts = range(0, len(entries), _BATCH_SIZE)
            batches = [(entries[i : i + _BATCH_SIZE], requests[i : i + _BATCH_SIZE]) for i in starts]
            if len(batches) > 1:  # the gateway accepts one request wholly or not at all, but not several
                checking = _with_progress(batches, "checking", report)
                checked = [self._send_batch(*batch, check_only=True, retry=retry) for batch in checking]
                raise_problems([problem for problems, _ in checked for problem in problems])
            submitted: list[SubmittedJob] = []
            for batch in _with_progress(batches, "submitting", report):
                problems, done = self._send_batch(*batch, check_only=False, retry=retry)
                raise_problems(problems, submitted=len(submitted))
                submitted += done
        return submitted

    def get(self, job_id: str) -> Job:
        """Returns the current state of a job."""
        return Job.from_wire(self._transport.request_json("GET", _job_path(job_id)))

    def cancel(self, job_id: str) -> Job:
        """Requests that a job stop. It publishes nothing afterwards."""
        return Job.from_wire(self._transport.request_json("POST", _job_path(job_id, "/cancel")))

    def pause(self, job_id: str) -> Job:
        """Requests that a job pause; its progress is kept."""
        return Job.from_wire(self._transport.request_json("POST", _job_path(job_id, "/pause")))

    def resume(self, job_id: str) -> Job:
        """Resumes a paused job."""
        return Job.from_wire(self._transport.request_json("POST", _job_path(job_id, "/resume")))

    def retry(self, job_id: str) -> Job:
        """Queues a failed or cancelled job again; it resumes from its last checkpoint if that still exists.

        Raises:
            Conflict: The job neither failed nor was cancelled, or its data was deleted.
        """
        return Job.from_wire(self._transport.request_json("POST", _job_path(job_id, "/retry")))

    def checkpoints(self, job_id: str) -> Sequence[Checkpoint]:
        """Returns the checkpoints of a job, the latest first; `chat` accepts the `model` of those that are kept."""
        rows = self._transport.paginate(_job_path(job_id, "/checkpoints"), limit=_PAGE_SIZE)
        return [Checkpoint.from_wire(row) for row in rows]

    def metrics(self, job_id: str) -> Sequence[MetricPoint]:
        """Returns the measurements of each step of a job so far."""
        content = b"".join(self._files.content(results_id(job_id))).decode()
        table = csv.DictReader(io.StringIO(content, newline=""))
        return [MetricPoint.from_row(row) for row in table]

    def events(self, job_id: str, *, follow: bool = False, poll_seconds: float = 1.0) -> Iterator[Event]:
        """Yields the history of a job, oldest first.

        Args:
            job_id: The job.
            follow: Wait for further events until the job ends.
            poll_seconds: Interval between requests if `follow` is set.
        """
        last: str | None = None
        while True:
            final = not follow or _through_outages(partial(self.get, job_id)).status.final
            for event in _through_outages(partial(self._events_after, job_id, last)):
                last = event.id
                yield event
            if final:
                return
            time.sleep(poll_seconds)

    def wait(self, job_id: str, on_progress: Callable[[Job], None] | None = None, *, poll_seconds: float = 1.0) -> Job:
        """Waits until a job has succeeded, through outages of the gateway of up to a minute.

        Args:
            job_id: The job.
            on_progress: Called with the state of the job after each request.
            poll_seconds: Interval between requests.

        Raises:
            JobError: The job failed (the class gives the reason) or, as JobCancelled, was cancelled.
        """
        while True:
            job = _through_outages(partial(self.get, job_id))
            if on_progress is not None:
                on_progress(job)
            if (failure := job.failure) is not None:
                raise failure
            if job.status.final:
                return job
            time.sleep(poll_seconds)

    def list(self, tenant: str | None = None) -> Iterator[Job]:
        """Yields jobs, newest first: the key's own, or for an admin's key those of `tenant` or of all."""
        return (Job.from_wire(row) for row in self._transport.paginate(_JOBS, tenant=tenant, limit=_PAGE_SIZE))

    def _served_base(self) -> str:
        for model in self._transport.paginate("/v1/models"):
            if "/" not in str(model["id"]):
                return str(model["id"])
        raise unexpected_response(self._transport.url, "it serves no base model")

    def _check_tenants(self, entries: Sequence[JobFileEntry]) -> None:
        """Raises InvalidRequest for entries of tenants that do not exist, before anything is uploaded."""
        first = {entry.adapter.tenant: entry.where for entry in reversed(entries)}
        problems = []
        for tenant, where in reversed(first.items()):
            try:
                self._transport.request_json("GET", f"/v1/tenants/{quote(tenant, safe='')}")
            except NotFound as error:
                problems.append(f"{where}: {error.message} (`loramill tenant create {tenant}` creates it.)")
            except Forbidden:  # a tenant's key may not read tenants; its uploads will fail instead
                continue
        raise_problems(problems)

    def _upload_all(
        self, uploads: Uploads, entries: Sequence[JobFileEntry], name: str, report: OnProgress
    ) -> Sequence[dict[str, Any]]:
        """Uploads each source once per tenant; returns the request body of each entry."""
        base = self._served_base()
        uploaded: dict[tuple[object, ...], str | LoramillError | None] = {}
        problems: Sequence[str] = []
        requests = []
        for entry in _with_progress(entries, "uploading", report):
            tenant, columns = entry.adapter.tenant, entry.columns
            train = _upload_once(uploaded, uploads.train, entry.train, tenant, columns)
            valid = _upload_once(uploaded, uploads.valid, entry.valid, tenant, columns, entry.valid_columns)
            errors = [each for each in (train, valid) if isinstance(each, LoramillError)]
            lines = dict.fromkeys(f"{entry.where}: {line}" for error in errors for line in _problem_lines(error))
            problems = [*problems, *lines]
            if not errors:
                requests.append(request_body(entry, train, valid, entry.options.base or base, name))
        raise_problems(problems)
        return requests

    def _send_batch(
        self, entries: Sequence[JobFileEntry], requests: Sequence[Mapping[str, Any]], *, check_only: bool, retry: bool
    ) -> tuple[Sequence[str], Sequence[SubmittedJob]]:
        """Sends one request; returns its problems, or if there are none and it is not a check, the submitted jobs."""
        body = {"jobs": requests, "check_only": check_only, "retry": retry}
        found = self._transport.request_json("POST", f"{_JOBS}/batch", json=body)["data"]
        problems = [
            f"{entry.where}: {line}"
            for entry, each in zip(entries, found, strict=True)
            if each["error"]
            for line in _problem_lines(error_from_response(400, {"error": each["error"]}, self._transport.url))
        ]
        if problems or check_only:
            return problems, []
        return [], [
            SubmittedJob(where=entry.where, job=Job.from_wire(each["job"]), new=each["new"])
            for entry, each in zip(entries, found, strict=True)
        ]

    def _events_after(self, job_id: str, last: str | None) -> Sequence[Event]:
        new = []
        for row in self._transport.paginate(_job_path(job_id, "/events"), limit=_PAGE_SIZE):  # newest first
            if row.get("id") == last:
                break
            new.append(Event.from_wire(row))
        return new[::-1]


def _through_outages(request: Callable[[], _T]) -> _T:
    errors = (NotRunning, Unavailable, Overloaded)
    return retry_while_unavailable(request, timeout_seconds=_OUTAGE_SECONDS, pause_seconds=1.0, errors=errors)


def _job_path(job_id: str, below: str = "") -> str:
    if _ADAPTER_NAME.fullmatch(job_id):
        raise InvalidRequest(
            f"'{job_id}' is the name of an adapter, not of a job: a job's id begins with ftjob-, and "
            "`loramill jobs` lists them."
        )
    return f"{_JOBS}/{quote(job_id, safe='')}{below}"


def _with_progress(items: Sequence[_T], stage: str, report: OnProgress) -> Iterator[_T]:
    for done, item in enumerate(items):
        report(stage, done, len(items))
        yield item
    report(stage, len(items), len(items))


def _upload_once(
    uploaded: dict[tuple[object, ...], Any], upload: Callable[..., str | None], source: Any, *rest: Any
) -> Any:
    """Returns the id of a source's uploaded file, or the error; `uploaded` caches both."""
    key = (source, *map(str, rest))
    if key not in uploaded:
        try:
            uploaded[key] = upload(source, *rest)
        except (NotRunning, Unavailable):
            raise
        except LoramillError as error:
            uploaded[key] = error
    return uploaded[key]


def _problem_lines(error: LoramillError) -> Sequence[str]:
    problems: Sequence[str] = getattr(error, "problems", ())
    return problems or error.message.split("\n")


def _refuse_duplicates(entries: Sequence[JobFileEntry], requests: Sequence[Mapping[str, Any]]) -> None:
    first: dict[str, str] = {}
    raise_problems(
        [
            f"{entry.where}: the same job as {where}; remove one, or give it another seed."
            for entry, request in zip(entries, requests, strict=True)
            if (where := first.setdefault(request["metadata"]["loramill_key"], entry.where)) != entry.where
        ]
    )
