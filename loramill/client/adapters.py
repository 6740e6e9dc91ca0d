"""`client.adapters`: adapters, their versions and aliases, and the data for nightly runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from loramill.client.adapter_folder import ADAPTER_FILES, adapter_file
from loramill.client.download import download
from loramill.client.models import Adapter, parse_object
from loramill.client.uploads import OnUpload, Source, Uploads
from loramill.data.ingest import Columns
from loramill.names import AdapterName
from loramill.submission.options import drop_none
from loramill.types import (
    AdapterData,
    AdapterRecord,
    Approval,
    DeletionSummary,
    NewDataState,
    Removal,
    RetentionPolicy,
    RolloutState,
)

if TYPE_CHECKING:
    from loramill.client.files import FilesResource
    from loramill.client.http import Transport


class AdaptersResource:
    """Adapters of a gateway. `name` is always `tenant/adapter`."""

    def __init__(self, transport: Transport, files: FilesResource) -> None:
        self._transport = transport
        self._files = files

    def get(self, name: str) -> Adapter:
        """Returns an adapter with its versions, the history of its aliases, and its evaluations."""
        return parse_object(Adapter, self._transport.request_json("GET", _adapter_path(name)))

    def promote(self, name: str, version: str) -> AdapterRecord:
        """Makes a version the champion, which answers requests.

        Args:
            name: `tenant/adapter`.
            version: Id of the version, at least its first 8 digits, or an alias.
        """
        return self._post(name, "promote", version=version)

    def rollback(self, name: str) -> AdapterRecord:
        """Makes the previous champion the champion again."""
        return self._post(name, "rollback")

    def pin(self, name: str, version: str = "champion") -> AdapterRecord:
        """Makes a version the champion; no nightly run, promotion or rollback replaces it until `unpin`."""
        return self._post(name, "pin", version=version)

    def unpin(self, name: str) -> AdapterRecord:
        """Allows the champion to change again."""
        return self._post(name, "unpin")

    def start_canary(
        self,
        name: str,
        share: float,
        *,
        shadow: bool = False,
        version: str | None = None,
        promote_after_seconds: float | None = None,
        min_requests: int | None = None,
    ) -> RolloutState:
        """Lets the challenger answer a share of the requests, or changes the share of the present canary.

        Args:
            name: `tenant/adapter`.
            share: 0 to 1. Each user gets answers of one version while the share does not shrink.
            shadow: The challenger answers copies of the share, which are compared and not sent.
            version: A version that becomes the challenger. Default: the challenger.
            promote_after_seconds: When the challenger is promoted, unless it is worse. Default: never; for an open
                canary, as before.
            min_requests: Number of requests from which the versions are compared. Default: 50; for an open canary, as
                before.
        """
        body = {
            "share": share,
            "shadow": shadow,
            "version": version,
            "promote_after_seconds": promote_after_seconds,
            "min_requests": min_requests,
        }
        response = self._transport.request_json("POST", f"{_adapter_path(name)}/canary", json=drop_none(body))
        return parse_object(RolloutState, response)

    def end_canary(self, name: str) -> RolloutState:
        """Ends the canary of an adapter: its champion answers all requests again."""
        return parse_object(RolloutState, self._transport.request_json("DELETE", f"{_adapter_path(name)}/canary"))

    def list_approvals(self, tenant: str | None = None) -> Sequence[Approval]:
        """Returns the challengers that passed the gate of a nightly run and wait for approval.

        Args:
            tenant: Only those of this tenant (for an admin's key).
        """
        return [
            parse_object(Approval, row) for row in self._transport.paginate("/v1/adapters/approvals", tenant=tenant)
        ]

    def approve(self, name: str, run: str, note: str = "") -> Approval:
        """Lets a challenger that waits for approval take over, as nightly.yaml specified during the run.

        Args:
            name: `tenant/adapter`.
            run: ID of the nightly run.
            note: Why; the report of the run shows it.

        Raises:
            Conflict: It was decided before, or the champion is not the one that it was compared with.
        """
        return self._decide(name, run, "approve", note)

    def reject(self, name: str, run: str, note: str = "") -> Approval:
        """Drops a challenger that waits for approval; its version is kept. See `approve`."""
        return self._decide(name, run, "reject", note)

    def rename(self, name: str, to: str) -> AdapterRecord:
        """Renames an adapter with everything that belongs to it; the tenant stays the same."""
        return self._post(name, "rename", to=to)

    def warm(self, name: str, version: str = "champion") -> float:
        """Loads a version before its first request; returns the seconds that this took."""
        path = f"{_adapter_path(name)}/warm"
        return float(self._transport.request_json("POST", path, json={"version": version})["seconds"])

    def set_retention(self, name: str, retention: RetentionPolicy | None) -> AdapterRecord:
        """Sets which versions of an adapter are kept.

        Args:
            name: `tenant/adapter`.
            retention: In place of the settings'; None: that of the settings.
        """
        terms = None if retention is None else retention.model_dump(exclude_none=True)
        response = self._transport.request_json("POST", f"{_adapter_path(name)}/retention", json={"retention": terms})
        return parse_object(AdapterRecord, response)

    def prune(self, *, dry_run: bool = False, tenant: str | None = None) -> Sequence[Removal]:
        """Removes the versions that the retention of their adapters no longer keeps; returns them.

        A version that an alias, an evaluation, an open job, a running nightly run or a request since yesterday refers
        to is never removed.

        Args:
            dry_run: Only return what would be removed.
            tenant: Only this tenant's adapters (for an admin's key).
        """
        response = self._transport.request_json("POST", "/v1/adapters/prune", tenant=tenant, json={"dry_run": dry_run})
        return [parse_object(Removal, row) for row in response["data"]]

    def delete(self, name: str, *, cancel_jobs: bool = False) -> DeletionSummary:
        """Deletes an adapter with its versions, jobs, history, evaluations and new data. Uploaded files are kept.

        Args:
            name: `tenant/adapter`.
            cancel_jobs: Cancel its unfinished jobs; otherwise they raise a Conflict.
        """
        params = {"cancel_jobs": cancel_jobs}
        return parse_object(DeletionSummary, self._transport.request_json("DELETE", _adapter_path(name), params=params))

    def delete_version(self, name: str, version: str, *, force: bool = False) -> None:
        """Deletes one version of an adapter.

        Args:
            name: `tenant/adapter`.
            version: Id of the version, or at least its first 8 digits.
            force: Delete the challenger or the previous champion, too; otherwise they raise a Conflict. The champion
                always does.
        """
        path = f"{_adapter_path(name)}/versions/{quote(version, safe='')}"
        self._transport.request_json("DELETE", path, params={"force": force})

    def export(
        self, name: str, to: Path, *, full: bool = False, on_bytes: Callable[[int, int], None] | None = None
    ) -> str:
        """Downloads a version into the new folder `to`, as PEFT and vLLM load it; returns the version's id.

        Either all files are written, each with the content that was stored, or none.

        Args:
            name: `tenant/adapter`, or with `@` an alias or version.
            to: Folder to create.
            full: Download the complete weights of a full fine-tune, as a Hugging Face folder, instead of the adapter.
            on_bytes: Called with the number of bytes received so far and the total.
        """
        return download(self._transport, name, to, full=full, on_bytes=on_bytes)

    def import_folder(self, name: str, folder: Path, *, promote: bool = False) -> tuple[str, AdapterRecord]:
        """Stores an adapter that was trained elsewhere on the served base; returns its version and its adapter.

        Args:
            name: `tenant/adapter`; the adapter is created if it does not exist.
            folder: Folder with PEFT's adapter_config.json and adapter_model.safetensors.
            promote: Make the version the champion. The first version of an adapter always is.

        Raises:
            InvalidRequest: A file is missing, or the adapter is broken, incomplete, of another base, or of an
                unsupported kind.
        """
        path = f"{_adapter_path(name)}/import"
        files = {field: adapter_file(folder, file) for field, file in ADAPTER_FILES.items()}
        response = self._transport.request_json("POST", path, files=files, data={"promote": str(promote).lower()})
        return str(response["version"]), parse_object(AdapterRecord, response)

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
        """Adds new examples or preference pairs for the next nightly run to train on.

        Args:
            name: `tenant/adapter`.
            train: Examples or preference pairs to train on.
            valid: Examples to evaluate with. Default: some of the new examples are held out.
            columns: As for `client.jobs.submit`.
            valid_columns: As for `client.jobs.submit`.
            on_upload: Called with each uploaded file.

        Returns:
            The state of the adapter's new data.
        """
        tenant = AdapterName.parse(name).tenant
        with Uploads(self._files, on_upload) as uploads:
            request = {
                "training_file": uploads.train(train, tenant, columns),
                "validation_file": uploads.valid(valid, tenant, columns, valid_columns),
            }
            path = f"{_adapter_path(name)}/data"
            response = self._transport.request_json("POST", path, json=drop_none(request))
        return parse_object(NewDataState, response["new_data"])

    def list_data(self, name: str) -> Sequence[AdapterData]:
        """Returns the data that was added for nightly runs of an adapter, newest first."""
        return [parse_object(AdapterData, row) for row in self._transport.paginate(f"{_adapter_path(name)}/data")]

    def list(self, tenant: str | None = None) -> Sequence[AdapterRecord]:
        """Returns the adapters that the API key may use, or those of one tenant, with their aliases."""
        return [parse_object(AdapterRecord, row) for row in self._transport.paginate("/v1/adapters", tenant=tenant)]

    def _decide(self, name: str, run: str, decision: str, note: str) -> Approval:
        body = {"run": run, "decision": decision, "note": note}
        response = self._transport.request_json("POST", f"{_adapter_path(name)}/approval", json=body)
        return parse_object(Approval, response)

    def _post(self, name: str, action: str, **body: str) -> AdapterRecord:
        path = f"{_adapter_path(name)}/{action}"
        return parse_object(AdapterRecord, self._transport.request_json("POST", path, json=body or None))


def _adapter_path(adapter: str) -> str:
    return f"/v1/adapters/{AdapterName.parse(adapter)}"
