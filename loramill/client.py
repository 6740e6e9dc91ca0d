"""The gateway from Python: `loramill.Client`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, ParamSpec, Self, TypeVar
from urllib.parse import quote

from loramill.errors import InvalidRequest, NotRunning, Overloaded, SettingsInvalid, Unauthenticated, Unavailable
from loramill.names import AdapterName
from loramill.settings import Settings
from loramill.types import AdapterRecord, KeyRecord, TenantRecord
from loramill.views import Adapter, Event, File, Job, NewKey, view
from loramill.wire import Wire, foreign, is_loopback, openai_errors

if TYPE_CHECKING:
    import openai

#: Where examples come from: a JSONL file (its path), its content, or an uploaded file (or its id, `file-…`).
Source = Path | str | bytes | File

#: A conversation, such as `[{"role": "user", "content": "Hello"}]`, or just what the user says.
Messages = str | Iterable[Mapping[str, str]]

_P = ParamSpec("_P")
_T = TypeVar("_T")
#: Seconds for which `wait` and `events` bear with a gateway that is away.
_PATIENCE = 60.0

_PAGE = 100
_JOBS = "/v1/fine_tuning/jobs"


class Client:
    """Everything a tenant or an admin does with a gateway.

        with loramill.Client() as mill:
            job = mill.submit("acme/support", "train.jsonl", valid="valid.jsonl", epochs=3)
            mill.wait(job.id)
            print(mill.chat("acme/support", "Where is my parcel?"))

    Without arguments it calls the gateway of the settings (this machine's, unless LORAMILL_URL says
    otherwise) with LORAMILL_API_KEY or, on this machine, the admin key that `loramill up` left.
    A tenant's key acts for its tenant. An admin's key acts for `organization`, and for the tenant in
    the adapter's name where there is one. `timeout` (seconds) bounds the wait for one answer.

    A `Source` of examples is a JSONL file's path, its content as bytes, or an uploaded file (or its id,
    `file-…`); `Messages` are a list such as [{"role": "user", "content": "Hello"}], or what the user says.

    Every method raises errors of `loramill.errors`: NotRunning and Unavailable where no gateway answers,
    Unauthenticated and Forbidden about the key, otherwise what the gateway found wrong.
    """

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        organization: str | None = None,
        *,
        timeout: float = 120.0,
    ) -> None:
        if not (url and api_key):
            settings = Settings.load()
            url = url or settings.gateway
            api_key = api_key or _key_of(settings, url)
        self.url = url.rstrip("/").removesuffix("/v1")
        self._key = api_key
        self._organization = organization
        if self._key and not (self._key.isascii() and self._key.isprintable()):
            raise SettingsInvalid("The API key holds characters that no key has; correct LORAMILL_API_KEY.")
        self._wire = Wire(self.url, self._key, organization, timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections."""
        self._wire.close()

    # Asking models

    def models(self) -> list[str]:
        """Names that `chat` takes: the base, and each adapter the key may use."""
        return [str(model["id"]) for model in self._wire.pages("/v1/models")]

    def chat(self, model: str, messages: Messages, **parameters: Any) -> str:
        """The model's answer. `parameters` are OpenAI's: max_tokens, temperature, seed, …"""
        with openai_errors(self.url), self.openai() as client:
            answer = client.chat.completions.create(model=model, messages=_conversation(messages), **parameters)
        return answer.choices[0].message.content or ""

    def stream(self, model: str, messages: Messages, **parameters: Any) -> Iterator[str]:
        """The model's answer, piece by piece as it is generated."""
        with openai_errors(self.url), self.openai() as client:
            chunks = client.chat.completions.create(
                model=model, messages=_conversation(messages), stream=True, **parameters
            )
            for chunk in chunks:
                if chunk.choices and (text := chunk.choices[0].delta.content):
                    yield text

    def openai(self) -> openai.OpenAI:
        """An `openai` client that talks to this gateway, for whatever OpenAI's API has beyond `chat`."""
        from openai import DefaultHttpxClient, OpenAI

        if self._key is None:
            raise Unauthenticated("There is no API key: set LORAMILL_API_KEY, or give Client(api_key=…).")
        return OpenAI(
            base_url=f"{self.url}/v1",
            api_key=self._key,
            organization=self._organization,
            http_client=DefaultHttpxClient(trust_env=not is_loopback(self.url)),
        )

    def ready(self) -> bool:
        """Whether the gateway is up and its models answer."""
        return self._wire.answers("/readyz")

    # Data and jobs

    def upload(self, data: Source, *, tenant: str | None = None, filename: str = "train.jsonl") -> File:
        """Uploads examples, which the gateway validates at once; `filename` names bytes.

        Raises:
            DatasetInvalid: examples are wrong; the message gives file, line and field of every problem.
            InvalidRequest: the file can't be read.
        """
        if isinstance(data, File):
            return data
        if isinstance(data, bytes):
            content = data
        else:
            filename, content = Path(data).name, _read(Path(data))
        form = {"purpose": "fine-tune"}
        return File.read(
            self._wire.call("POST", "/v1/files", tenant=tenant, data=form, files={"file": (filename, content)})
        )

    def submit(
        self,
        adapter: str,
        train: Source,
        *,
        valid: Source | None = None,
        rank: int | None = None,
        alpha: float | None = None,
        rslora: bool | None = None,
        dropout: float | None = None,
        targets: Sequence[str] | None = None,
        learning_rate: float | None = None,
        epochs: int | None = None,
        steps: int | None = None,
        batch_size: int | None = None,
        warmup_ratio: float | None = None,
        weight_decay: float | None = None,
        max_grad_norm: float | None = None,
        max_length: int | None = None,
        checkpoint_every: int | None = None,
        start_from: str | None = None,
        seed: int | None = None,
        metadata: Mapping[str, str] | None = None,
        base: str | None = None,
    ) -> Job:
        """Submits a fine-tune job that makes a new version of `adapter`, and returns at once.

        Args:
            adapter: `tenant/adapter`; the adapter comes into being with its first job.
            train: examples to learn from, chat or prompt/completion JSONL.
            valid: examples to measure the loss on.
            start_from: "champion" or a version to go on from; fresh by default.
            epochs, steps: passes over the examples, or optimizer steps; `steps` wins.
            base: the model to tune, by default the gateway's.

        Hyperparameters that aren't given are chosen by the gateway; `Job.spec` tells them all.
        """
        name = AdapterName.parse(adapter)
        usual = {"n_epochs": epochs, "batch_size": batch_size}
        own = {
            "rank": rank,
            "alpha": alpha,
            "rslora": rslora,
            "dropout": dropout,
            "targets": None if targets is None else list(targets),
            "learning_rate": learning_rate,
            "steps": steps,
            "warmup_ratio": warmup_ratio,
            "weight_decay": weight_decay,
            "max_grad_norm": max_grad_norm,
            "max_length": max_length,
            "checkpoint_every": checkpoint_every,
            "start_from": start_from,
        }
        request = {
            "model": base or self._base(),
            "suffix": name.adapter,
            "training_file": self._file_id(train, name.tenant, "train.jsonl"),
            "validation_file": None if valid is None else self._file_id(valid, name.tenant, "valid.jsonl"),
            "method": {"type": "supervised", "supervised": {"hyperparameters": _given(usual)}},
            "loramill": _given(own),
            "seed": seed,
            "metadata": None if metadata is None else dict(metadata),
        }
        return Job.read(self._wire.call("POST", _JOBS, tenant=name.tenant, json=_given(request)))

    def jobs(self, tenant: str | None = None) -> Iterator[Job]:
        """Jobs, newest first: a tenant's own; an admin's key sees those of `tenant`, or of all."""
        return (Job.read(row) for row in self._wire.pages(_JOBS, tenant=tenant, limit=_PAGE))

    def job(self, job_id: str) -> Job:
        """One job as it is now."""
        return Job.read(self._wire.call("GET", f"{_JOBS}/{quote(job_id, safe='')}"))

    def cancel(self, job_id: str) -> Job:
        """Asks a job to stop; it publishes nothing from then on."""
        return Job.read(self._wire.call("POST", f"{_JOBS}/{quote(job_id, safe='')}/cancel"))

    def events(self, job_id: str, *, follow: bool = False, every: float = 1.0) -> Iterator[Event]:
        """A job's history, oldest first; `follow` waits for more, looking `every` so many seconds, until it ends."""
        last: str | None = None
        while True:
            final = not follow or self._patiently(self.job, job_id).status.final
            for event in self._patiently(self._events_after, job_id, last):
                last = event.id
                yield event
            if final:
                return
            time.sleep(every)

    def wait(self, job_id: str, on_progress: Callable[[Job], None] | None = None, *, every: float = 1.0) -> Job:
        """Waits until a job has succeeded; `on_progress` sees it as it is `every` so many seconds.

        Outlives a gateway that is away for up to a minute.

        Raises:
            JobError: it failed (the class tells how), or, as JobCancelled, it was cancelled.
        """
        while True:
            job = self._patiently(self.job, job_id)
            if on_progress is not None:
                on_progress(job)
            if (failure := job.failure) is not None:
                raise failure
            if job.status.final:
                return job
            time.sleep(every)

    # Adapters

    def adapters(self, tenant: str | None = None) -> list[AdapterRecord]:
        """The adapters the key may use, or those of one tenant, and where their aliases point."""
        return [view(AdapterRecord, row) for row in self._wire.pages("/v1/adapters", tenant=tenant)]

    def adapter(self, name: str) -> Adapter:
        """One adapter with its versions, the history of its aliases, and its evaluations."""
        return view(Adapter, self._wire.call("GET", _path(name)))

    def promote(self, name: str, version: str) -> AdapterRecord:
        """Makes a version (its id, 8 digits of it or more, or an alias) the champion: the one that answers."""
        return view(AdapterRecord, self._wire.call("POST", f"{_path(name)}/promote", json={"version": version}))

    def rollback(self, name: str) -> AdapterRecord:
        """Makes the previous champion the champion again."""
        return view(AdapterRecord, self._wire.call("POST", f"{_path(name)}/rollback"))

    def add_data(self, name: str, train: Source, *, valid: Source | None = None) -> None:
        """Gives an adapter new examples, from which the next night trains it."""
        tenant = AdapterName.parse(name).tenant
        request = {
            "training_file": self._file_id(train, tenant, "train.jsonl"),
            "validation_file": None if valid is None else self._file_id(valid, tenant, "valid.jsonl"),
        }
        self._wire.call("POST", f"{_path(name)}/data", json=_given(request))

    # Tenants and keys: an admin's key

    def create_tenant(self, name: str) -> TenantRecord:
        """Makes a tenant. Conflict: the name is taken."""
        return view(TenantRecord, self._wire.call("POST", "/v1/tenants", json={"name": name}))

    def tenants(self) -> list[TenantRecord]:
        """All tenants."""
        return [view(TenantRecord, row) for row in self._wire.pages("/v1/tenants")]

    def create_key(self, tenant: str) -> NewKey:
        """Makes an API key for a tenant; its `key` is shown this once."""
        return view(NewKey, self._wire.call("POST", f"/v1/tenants/{quote(tenant, safe='')}/keys"))

    def keys(self, tenant: str) -> list[KeyRecord]:
        """A tenant's keys, without their secrets."""
        return [view(KeyRecord, row) for row in self._wire.pages(f"/v1/tenants/{quote(tenant, safe='')}/keys")]

    def revoke_key(self, key_id: str) -> None:
        """Makes a key (by its id) worthless at once."""
        self._wire.call("DELETE", f"/v1/keys/{quote(key_id, safe='')}")

    # How it is done

    def _base(self) -> str:
        for name in self.models():
            if "/" not in name:
                return name
        raise foreign(self.url, "it serves no base model")

    def _file_id(self, source: Source, tenant: str, filename: str) -> str:
        if isinstance(source, str) and source.startswith("file-"):
            return source
        return self.upload(source, tenant=tenant, filename=filename).id

    def _events_after(self, job_id: str, last: str | None) -> list[Event]:
        fresh = []
        for row in self._wire.pages(f"{_JOBS}/{quote(job_id, safe='')}/events", limit=_PAGE):  # newest first
            if row.get("id") == last:
                break
            fresh.append(Event.read(row))
        return fresh[::-1]

    def _patiently(self, ask: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                return ask(*args, **kwargs)
            except (NotRunning, Unavailable, Overloaded):
                if time.monotonic() > deadline:
                    raise
                time.sleep(1.0)


def _key_of(settings: Settings, url: str) -> str | None:
    """The key of the settings, or this machine's admin key, which no other machine must ever see."""
    if settings.api_key:
        return settings.api_key
    if not is_loopback(url) or not settings.admin_key_file.exists():
        return None
    try:
        return settings.admin_key_file.read_text().strip()
    except OSError as error:
        raise Unauthenticated(f"The admin key in {settings.admin_key_file} can't be read: {error.strerror}.") from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidRequest(f"{path} can't be read: {error.strerror}.") from error


def _path(adapter: str) -> str:
    return f"/v1/adapters/{AdapterName.parse(adapter)}"


def _given(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _conversation(messages: Messages) -> Any:
    if isinstance(messages, str):
        return [{"role": "user", "content": messages}]
    return [dict(message) for message in messages]
