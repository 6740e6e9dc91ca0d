"""The files of a version: listed with their hashes, and sent as they were stored."""

from __future__ import annotations

import hashlib
import time
from typing import Any

import httpx
import pytest

from loramill.names import AdapterName
from loramill.registry import datasets, jobs
from loramill.storage.manifest import Manifest, ManifestEntry
from loramill.types import JobSpec, VersionRecord

FILES = {"adapter_config.json": b'{"r": 8}', "adapter_model.safetensors": bytes(range(256)) * 9000}
WHOLE = {"config.json": b"{}", "model.safetensors": bytes(range(256))[::-1] * 10}


def published(site: Any, adapter: str, files: dict[str, bytes], whole: dict[str, bytes] | None = None) -> str:
    """A version of a job, which was a full fine-tune if there are whole weights."""
    name = AdapterName.parse(adapter)
    version = site.registry.artifacts.put(files)
    result = site.registry.artifacts.put(whole) if whole else None
    with site.registry.writing() as session:
        data = datasets.create(session, name.tenant, "a.jsonl", "0" * 64, 1, 1).id
        spec = JobSpec(base=site.base.fingerprint, adapter=adapter, train=data, steps=1, batch_size=1)
        job = jobs.submit(session, spec, {}).id
        attempt = 0
        while attempt == 0:  # other tests may have left jobs in the queue
            leased = jobs.lease(session, "worker", now=time.time(), seconds=60, max_attempts=1)
            attempt = leased.attempt if leased.id == job else 0
        record = VersionRecord(id=version, adapter=adapter, job=job, base=spec.base, bytes=9, created_at=time.time())
        jobs.publish(session, job, attempt, record, result=result)
    return version


def test_every_file_arrives_as_it_was_stored(http: httpx.Client, site: Any, tenant: str) -> None:
    name = f"{tenant}/support"
    version = published(site, name, FILES | {"who": tenant.encode()})
    listed = http.get(f"/v1/adapters/{name}/files").json()
    assert (listed["object"], listed["adapter"], listed["version"]) == ("adapter.files", name, version)
    entries = {file: ManifestEntry(**entry) for file, entry in listed["files"].items()}
    assert Manifest(entries).hash == version == listed["artifact"]
    for file, content in FILES.items():
        answer = http.get(f"/v1/adapters/{name}/files/{file}")
        assert (answer.status_code, answer.content) == (200, content)
        assert entries[file] == ManifestEntry(hashlib.sha256(content).hexdigest(), len(content))
    second = published(site, name, {"who": b"second " + tenant.encode()})
    for selector, expected in (("champion", version), ("challenger", second), (second[:9], second)):
        assert http.get(f"/v1/adapters/{name}/files", params={"version": selector}).json()["version"] == expected


def test_whole_weights_of_a_full_fine_tune(http: httpx.Client, site: Any, tenant: str) -> None:
    name, query = f"{tenant}/support", {"full": "true"}
    version = published(site, name, {"who": tenant.encode()}, WHOLE)
    listed = http.get(f"/v1/adapters/{name}/files", params=query).json()
    assert listed["version"] == version != listed["artifact"]
    assert listed["files"].keys() == WHOLE.keys()
    answer = http.get(f"/v1/adapters/{name}/files/model.safetensors", params=query | {"version": version})
    assert answer.content == WHOLE["model.safetensors"]
    other = published(site, f"{tenant}/lora", {"who": b"lora " + tenant.encode()})
    refused = http.get(f"/v1/adapters/{tenant}/lora/files", params=query)
    assert (refused.status_code, refused.json()["error"]["param"]) == (404, "full")
    assert other[:12] in refused.json()["error"]["message"]


def test_files_are_for_their_own_tenant_only(http: httpx.Client, site: Any, tenant: str, other: str) -> None:
    published(site, f"{other}/secret", {"who": other.encode()})
    for path in (f"/v1/adapters/{other}/secret/files", f"/v1/adapters/{other}/none/files"):
        for file in ("", "/who"):
            assert http.get(path + file).status_code == 403
    with site.http() as anonymous:
        assert anonymous.get(f"/v1/adapters/{other}/secret/files").status_code == 401
    with site.http(site.admin_key) as admin:
        assert admin.get(f"/v1/adapters/{other}/secret/files/who").content == other.encode()


@pytest.mark.parametrize(
    ("path", "status", "param"),
    [
        ("none/files", 404, "adapter"),
        ("support/files?version=previous", 404, "model"),
        ("support/files?version=0123456789", 404, "model"),
        ("support/files/none", 404, "file"),
        ("support/files/manifest.json", 404, "file"),
        ("support/files/..%2f..%2fsecret", 404, None),
        ("support/files?latest=1", 400, "latest"),
    ],
)
def test_unknown_adapters_versions_and_files(
    http: httpx.Client, site: Any, tenant: str, path: str, status: int, param: str | None
) -> None:
    published(site, f"{tenant}/support", {"who": tenant.encode()})
    answer = http.get(f"/v1/adapters/{tenant}/{path}")
    assert answer.status_code == status
    assert param is None or answer.json()["error"]["param"] == param
