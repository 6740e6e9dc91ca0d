"""The gateway from Python: `loramill.Client`."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import quote

from loramill.client.adapter_folder import ADAPTER_FILES, adapter_file
from loramill.client.admin import TenantsResource
from loramill.client.download import download
from loramill.client.http import Transport, is_local_url, translate_openai_errors
from loramill.client.jobs import JobsResource
from loramill.client.models import Adapter, parse_object
from loramill.client.uploads import OnUpload, Source, Uploads
from loramill.data.ingest import Columns
from loramill.errors import SettingsInvalid, Unauthenticated
from loramill.names import AdapterName
from loramill.settings import Settings
from loramill.submission.options import drop_none
from loramill.types import AdapterData, AdapterRecord, DeletionSummary, NewDataState

if TYPE_CHECKING:
    import openai

#: A conversation, such as `[{"role": "user", "content": "Hello"}]`, or just what the user says.
Messages = str | Iterable[Mapping[str, str]]


class Client(JobsResource, TenantsResource):
    """Everything a tenant or an admin does with a gateway.

        with loramill.Client() as mill:
            job = mill.submit("acme/support", "train.jsonl", valid="valid.jsonl", epochs=3)
            mill.wait(job.id)
            print(mill.chat("acme/support", "Where is my parcel?"))

    Without arguments it calls the gateway of the settings (this machine's, unless LORAMILL_URL says
    otherwise) with LORAMILL_API_KEY or, on this machine, the admin key that `loramill up` left.
    A tenant's key acts for its tenant. An admin's key acts for `organization`, and for the tenant in
    the adapter's name where there is one. `timeout` (seconds) bounds the wait for one answer.

    A `Source` of examples is a path (JSONL, JSON, CSV, TSV, Parquet, Arrow, or a folder that `datasets` saved), a data
    set of a hub (`hf:org/name:split`), JSONL as bytes, or an uploaded file (or its id, `file-…`);
    `Messages` are a list such as [{"role": "user", "content": "Hello"}], or what the user says.

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
            api_key = api_key or _default_api_key(settings, url)
        self.url = url.rstrip("/").removesuffix("/v1")
        self._api_key = api_key
        self._organization = organization
        if self._api_key and not (self._api_key.isascii() and self._api_key.isprintable()):
            raise SettingsInvalid("The API key holds characters that no key has; correct LORAMILL_API_KEY.")
        self._wire = Transport(self.url, self._api_key, organization, timeout)

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
        return [str(model["id"]) for model in self._wire.paginate("/v1/models")]

    def chat(self, model: str, messages: Messages, **parameters: Any) -> str:
        """The model's answer. `parameters` are OpenAI's: max_tokens, temperature, seed, …"""
        self._check_key()
        with translate_openai_errors(self.url), self.openai() as client:
            answer = client.chat.completions.create(model=model, messages=_message_list(messages), **parameters)
        return answer.choices[0].message.content or ""

    def stream(self, model: str, messages: Messages, **parameters: Any) -> Generator[str, None, None]:
        """The model's answer, piece by piece as it is generated."""
        self._check_key()
        with translate_openai_errors(self.url), self.openai() as client:
            chunks = client.chat.completions.create(
                model=model, messages=_message_list(messages), stream=True, **parameters
            )
            for chunk in chunks:
                if chunk.choices and (text := chunk.choices[0].delta.content):
                    yield text

    def _check_key(self) -> None:
        """Without a key, raises NotRunning if no gateway answers, and Unauthenticated if one does."""
        if self._api_key is None:
            self._wire.request_json("GET", "/v1/models")

    def openai(self) -> openai.OpenAI:
        """An `openai` client that talks to this gateway, for whatever OpenAI's API has beyond `chat`."""
        from openai import DefaultHttpxClient, OpenAI

        if self._api_key is None:
            raise Unauthenticated("There is no API key: set LORAMILL_API_KEY, or give Client(api_key=…).")
        return OpenAI(
            base_url=f"{self.url}/v1",
            api_key=self._api_key,
            organization=self._organization,
            http_client=DefaultHttpxClient(trust_env=not is_local_url(self.url)),
        )

    def ready(self) -> bool:
        """Whether the gateway is up and its models answer."""
        return self._wire.succeeds("/readyz")

    # Adapters

    def adapters(self, tenant: str | None = None) -> list[AdapterRecord]:
        """The adapters the key may use, or those of one tenant, and where their aliases point."""
        return [parse_object(AdapterRecord, row) for row in self._wire.paginate("/v1/adapters", tenant=tenant)]

    def adapter(self, name: str) -> Adapter:
        """One adapter with its versions, the history of its aliases, and its evaluations."""
        return parse_object(Adapter, self._wire.request_json("GET", _adapter_path(name)))

    def promote(self, name: str, version: str) -> AdapterRecord:
        """Makes a version (its id, 8 digits of it or more, or an alias) the champion: the one that answers."""
        return parse_object(
            AdapterRecord, self._wire.request_json("POST", f"{_adapter_path(name)}/promote", json={"version": version})
        )

    def rollback(self, name: str) -> AdapterRecord:
        """Makes the previous champion the champion again."""
        return parse_object(AdapterRecord, self._wire.request_json("POST", f"{_adapter_path(name)}/rollback"))

    def pin(self, name: str, version: str = "champion") -> AdapterRecord:
        """Makes a version the champion, which no night, promotion or rollback replaces until `unpin`."""
        return parse_object(
            AdapterRecord, self._wire.request_json("POST", f"{_adapter_path(name)}/pin", json={"version": version})
        )

    def unpin(self, name: str) -> AdapterRecord:
        """Lets the champion change again."""
        return parse_object(AdapterRecord, self._wire.request_json("POST", f"{_adapter_path(name)}/unpin"))

    def delete_adapter(self, name: str, *, cancel_jobs: bool = False) -> DeletionSummary:
        """Deletes an adapter with its versions, jobs, history, evaluations and waiting data; files stay.

        Args:
            cancel_jobs: cancels its jobs that have not ended; otherwise they are a Conflict.
        """
        return parse_object(
            DeletionSummary, self._wire.request_json("DELETE", _adapter_path(name), params={"cancel_jobs": cancel_jobs})
        )

    def delete_version(self, name: str, version: str, *, force: bool = False) -> None:
        """Deletes one version (its id, or at least the first 8 digits of it) of an adapter.

        Args:
            force: deletes the challenger or the previous champion, too; otherwise they are a Conflict. The champion
                always is one.
        """
        path = f"{_adapter_path(name)}/versions/{quote(version, safe='')}"
        self._wire.request_json("DELETE", path, params={"force": force})

    def rename(self, name: str, to: str) -> AdapterRecord:
        """Renames an adapter, with everything that belongs to it, to another name of the same tenant."""
        return parse_object(
            AdapterRecord, self._wire.request_json("POST", f"{_adapter_path(name)}/rename", json={"to": to})
        )

    def warm(self, name: str, version: str = "champion") -> float:
        """Has a version loaded, so that its next request needn't wait for that; returns the seconds that it took."""
        return float(
            self._wire.request_json("POST", f"{_adapter_path(name)}/warm", json={"version": version})["seconds"]
        )

    def export(
        self, name: str, to: Path, *, full: bool = False, on_bytes: Callable[[int, int], None] | None = None
    ) -> str:
        """Writes a version's files, as PEFT and vLLM load them, into the new folder `to`; returns the version.

        Args:
            name: `tenant/adapter`, or with `@` an alias or version.
            full: the whole weights of a full fine-tune, as a Hugging Face folder, instead of the adapter.
            on_bytes: called with the bytes that have come and those that will in all.

        All files are there in the end, each with the content that was stored, or none.
        """
        return download(self._wire, name, to, full=full, on_bytes=on_bytes)

    def import_adapter(self, name: str, folder: Path, *, promote: bool = False) -> tuple[str, AdapterRecord]:
        """Stores an adapter that was trained elsewhere on the served base; returns its version and its adapter.

        Args:
            name: `tenant/adapter`, created if it does not exist.
            folder: with PEFT's adapter_config.json and adapter_model.safetensors.
            promote: make it the champion, which it is anyway if it is the first.

        Raises:
            InvalidRequest: a file is missing; or the adapter is broken, incomplete, of another base, or of a kind
                that isn't supported.
        """
        files = {part: adapter_file(folder, file) for part, file in ADAPTER_FILES.items()}
        answer = self._wire.request_json(
            "POST", f"{_adapter_path(name)}/import", files=files, data={"promote": str(promote).lower()}
        )
        return str(answer["version"]), parse_object(AdapterRecord, answer)

    def add_data(
        self,
        name: str,
        train: Source,
        *,
        valid: Source | None = None,
        columns: Columns = None,
        valid_columns: Columns = None,
        on_upload: OnUpload | None = None,
    ) -> NewDataState:
        """Adds new examples for the next nightly run to train an adapter on; returns the state of all that wait.

        Args:
            name: `tenant/adapter`.
            train: examples to train on.
            valid: examples to evaluate with; without them, part of the new ones is held out.
            columns, valid_columns, on_upload: as `submit` takes them.
        """
        tenant = AdapterName.parse(name).tenant
        with Uploads(self, on_upload) as uploads:
            request = {
                "training_file": uploads.train(train, tenant, columns),
                "validation_file": uploads.valid(valid, tenant, columns, valid_columns),
            }
            answer = self._wire.request_json("POST", f"{_adapter_path(name)}/data", json=drop_none(request))
        return parse_object(NewDataState, answer["new_data"])

    def data(self, name: str) -> list[AdapterData]:
        """The data that an adapter was given for nightly runs, newest first."""
        return [parse_object(AdapterData, row) for row in self._wire.paginate(f"{_adapter_path(name)}/data")]


def _default_api_key(settings: Settings, url: str) -> str | None:
    """The key of the settings, or this machine's admin key, which no other machine must ever see."""
    if settings.api_key:
        return settings.api_key
    if not is_local_url(url) or not settings.admin_key_file.exists():
        return None
    try:
        return settings.admin_key_file.read_text().strip()
    except OSError as error:
        raise Unauthenticated(f"The admin key in {settings.admin_key_file} can't be read: {error.strerror}.") from error


def _adapter_path(adapter: str) -> str:
    return f"/v1/adapters/{AdapterName.parse(adapter)}"


def _message_list(messages: Messages) -> Any:
    if isinstance(messages, str):
        return [{"role": "user", "content": messages}]
    return [dict(message) for message in messages]
