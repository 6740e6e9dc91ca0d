"""Downloading a version: complete and verified, or nothing."""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loramill.client import Client
from loramill.errors import ArtifactCorrupt, DiskFull, Forbidden, InvalidRequest, ModelNotFound, NotFound, Unavailable
from loramill.registry import api_keys
from loramill.storage.atomic import new_folder

from ..conftest import RunningGateway, examples


@pytest.fixture
def version(gateway: RunningGateway, tenant: str) -> str:
    with gateway.client() as client:
        return gateway.publish(client.jobs.submit(f"{tenant}/a", examples()).id)


def stored(gateway: RunningGateway, version: str) -> Path:
    return gateway.registry.artifacts.fetch(version) / "adapter_model.safetensors"


def test_the_folder_contains_the_stored_files(
    gateway: RunningGateway, tenant: str, version: str, tmp_path: Path
) -> None:
    progress: list[tuple[int, int]] = []
    to = tmp_path / "new" / "adapter"
    with gateway.client() as client:
        assert client.adapters.export(f"{tenant}/a", to, on_bytes=lambda *each: progress.append(each)) == version
        client.adapters.export(f"{tenant}/a@{version[:8]}", tmp_path / "pinned")
    content = stored(gateway, version).read_bytes()
    for folder in (to, tmp_path / "pinned"):
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == {"adapter_model.safetensors": content}
        assert stat.S_IMODE(folder.stat().st_mode) & 0o500 == 0o500
    assert progress[-1] == (len(content), len(content))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "pinned"]


def damaged(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1] + b"?")


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])


@pytest.mark.parametrize("damage", [damaged, cut, Path.unlink])
def test_a_damaged_artifact_is_refused_and_leaves_no_files(
    gateway: RunningGateway, tenant: str, version: str, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    damage(stored(gateway, version))
    with gateway.client() as client, pytest.raises(ArtifactCorrupt, match=r"adapter_model\.safetensors"):
        client.adapters.export(f"{tenant}/a", tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


def test_wrong_hashes_from_the_gateway_are_detected(
    gateway: RunningGateway, tenant: str, version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A version's hash is computed from its files' hashes, so changed file hashes no longer match it."""
    with gateway.client() as client:
        call = client._transport.request_json

        def with_wrong_hash(*arguments: Any, **more: Any) -> dict[str, Any]:
            answer = call(*arguments, **more)
            answer["files"]["adapter_model.safetensors"]["sha256"] = "0" * 64
            return answer

        monkeypatch.setattr(client._transport, "request_json", with_wrong_hash)
        with pytest.raises(ArtifactCorrupt):
            client.adapters.export(f"{tenant}/a", tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


def test_a_connection_that_breaks_leaves_no_files(
    gateway: RunningGateway, tenant: str, version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import httpx

    def breaks(*_: Any) -> Any:
        yield b"some"
        raise httpx.ReadError("gone")

    monkeypatch.setattr(httpx.Response, "iter_bytes", breaks)
    with gateway.client() as client, pytest.raises(Unavailable):
        client.adapters.export(f"{tenant}/a", tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


def test_only_versions_of_the_own_tenant_are_exported(
    gateway: RunningGateway, tenant: str, version: str, tmp_path: Path
) -> None:
    with gateway.client() as admin:
        admin.tenants.create(f"{tenant}-rival")
    with gateway.registry.writing() as session:
        _, secret = api_keys.create(session, f"{tenant}-rival")
    with gateway.client(secret) as rival, pytest.raises(Forbidden):
        rival.adapters.export(f"{tenant}/a", tmp_path / "adapter")
    with gateway.client() as client:
        for name, error in (
            (f"{tenant}/none", NotFound),
            (f"{tenant}/a@previous", ModelNotFound),
            ("smollm2-135m", InvalidRequest),
        ):
            with pytest.raises(error):
                client.adapters.export(name, tmp_path / "adapter")
        with pytest.raises(NotFound, match="full fine-tuning"):
            client.adapters.export(f"{tenant}/a", tmp_path / "adapter", full=True)
    assert list(tmp_path.iterdir()) == []


def test_existing_files_are_not_overwritten(gateway: RunningGateway, tenant: str, version: str, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "empty").mkdir()
    with gateway.client() as client:
        for target in (tmp_path, tmp_path / "mine", tmp_path / "mine" / "below"):
            with pytest.raises(InvalidRequest):
                client.adapters.export(f"{tenant}/a", target)
        client.adapters.export(f"{tenant}/a", tmp_path / "empty")
    assert (tmp_path / "mine").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "mine"]


def test_a_full_disk_is_reported_and_leaves_no_files(tmp_path: Path) -> None:
    with pytest.raises(DiskFull, match="Nothing was written"), new_folder(tmp_path / "to") as folder:
        (folder / "part").write_bytes(b"1")
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_export_without_a_gateway_means_not_running(tmp_path: Path) -> None:
    from loramill.errors import NotRunning

    with Client("http://127.0.0.1:9", "lm-key") as client, pytest.raises(NotRunning):
        client.adapters.export("acme/a", tmp_path / "adapter")
