"""The artifact store: local folders and any other URL that fsspec supports."""

import errno
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramill.errors import ArtifactCorrupt, ArtifactMissing, DiskFull, InvalidRequest, SetupError
from loramill.registry import ArtifactStore, Registry, adapters, datasets, jobs, tenants
from loramill.storage.manifest import Manifest, digest_and_size
from loramill.types import VersionRecord

FILES = {"adapter_config.json": b'{"r": 8}', "adapter_model.safetensors": bytes(range(256)) * 40, "empty": b""}


@pytest.fixture
def local(tmp_path):
    return ArtifactStore((tmp_path / "a folder, 100 % ours").as_uri())


@pytest.fixture
def remote(tmp_path):
    files = fsspec.filesystem("memory")
    if files.exists("/artifacts"):
        files.rm("/artifacts", recursive=True)
    return ArtifactStore("memory://artifacts", cache=tmp_path / "cache")


@pytest.fixture(params=["local", "remote"])
def store(request):
    return request.getfixturevalue(request.param)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}


def test_files_are_read_as_they_were_put(store, tmp_path):
    (tmp_path / "model").write_bytes(FILES["adapter_model.safetensors"])
    artifact = store.put(FILES)
    assert re.fullmatch("[0-9a-f]{64}", artifact)
    assert store.put({**FILES, "adapter_model.safetensors": tmp_path / "model"}) == artifact
    assert contents(store.fetch(artifact)) == FILES
    assert store.read(artifact, "adapter_config.json") == FILES["adapter_config.json"]
    assert store.size(artifact) == sum(map(len, FILES.values()))


def test_the_hash_depends_on_the_content_alone(local, remote):
    assert local.put(FILES) == remote.put(dict(reversed(FILES.items())))


def test_a_local_store_is_where_its_url_says(tmp_path, local):
    artifact = local.put(FILES)
    assert local.fetch(artifact) == tmp_path / "a folder, 100 % ours" / artifact[:2] / artifact
    assert ArtifactStore(str(tmp_path / "a folder, 100 % ours")).fetch(artifact) == local.fetch(artifact)


names = st.text("ab.", min_size=1, max_size=4).filter(lambda name: name[0] != "." and ".." not in name)


@given(
    st.dictionaries(names, st.binary(max_size=9), min_size=1), st.dictionaries(names, st.binary(max_size=9), min_size=1)
)
def test_different_files_have_different_hashes(one, other):
    hashes = [
        Manifest({name: digest_and_size(content) for name, content in files.items()}).hash for files in (one, other)
    ]
    assert (hashes[0] == hashes[1]) == (one == other)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "/a", "..a", "a..b", ".hidden", "a\nb", "a\tb", "a\\b", "manifest.json", "ä"]
)
def test_names_are_checked(store, name):
    with pytest.raises(InvalidRequest):
        store.put({name: b""})


def test_an_artifact_has_files(store):
    with pytest.raises(InvalidRequest):
        store.put({})


@pytest.mark.parametrize("artifact", ["a" * 64, "", "../../../../etc", "A" * 64, "abc"])
def test_an_unknown_artifact_is_missing(store, artifact):
    for act in (store.fetch, store.size, lambda artifact: store.read(artifact, "x")):
        with pytest.raises(ArtifactMissing):
            act(artifact)


def test_a_file_that_the_artifact_does_not_have(store):
    artifact = store.put(FILES)
    for name in ("missing", "../x", "manifest.json"):
        with pytest.raises(ArtifactMissing, match=r"adapter_config.json"):
            store.read(artifact, name)


def _alter(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [_alter, Path.unlink, lambda path: os.truncate(path, 3)])
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "manifest.json"])
def test_damage_is_detected_and_repaired_by_putting_again(local, damage, name):
    artifact = local.put(FILES)
    damage(local.fetch(artifact) / name)
    expected = ArtifactMissing if name == "manifest.json" and damage is Path.unlink else ArtifactCorrupt
    with pytest.raises(expected) as error:
        local.fetch(artifact)
    assert artifact in error.value.message and (expected is ArtifactMissing or name in error.value.message)
    with pytest.raises(expected):
        local.read(artifact, "adapter_model.safetensors")
    assert local.put(FILES) == artifact
    assert contents(local.fetch(artifact)) == FILES


def test_damage_in_the_bucket_is_detected_and_repaired(remote):
    artifact = remote.put(FILES)
    model = f"memory://artifacts/{artifact[:2]}/{artifact}/adapter_model.safetensors"
    with fsspec.open(model, "wb") as file:
        file.write(b"something else")
    for act in (remote.fetch, lambda artifact: remote.read(artifact, "adapter_model.safetensors")):
        with pytest.raises(ArtifactCorrupt, match=r"adapter_model\.safetensors.*memory://"):
            act(artifact)
    remote.put(FILES)
    assert contents(remote.fetch(artifact)) == FILES


def test_a_damaged_cache_is_fetched_again(remote):
    artifact = remote.put(FILES)
    _alter(remote.fetch(artifact) / "adapter_config.json")
    assert contents(remote.fetch(artifact)) == FILES


def test_an_upload_without_its_manifest_is_missing(remote):
    artifact = remote.put(FILES)
    fsspec.filesystem("memory").rm(f"/artifacts/{artifact[:2]}/{artifact}/manifest.json")
    with pytest.raises(ArtifactMissing):
        remote.fetch(artifact)
    assert remote.remove_unreferenced((), 0) == 1
    assert fsspec.filesystem("memory").find("/artifacts") == []


def test_sweep_removes_old_unreferenced_artifacts(store):
    referenced, unreferenced = store.put(FILES), store.put({"a": b"1"})
    assert store.remove_unreferenced({referenced}, older_than=60) == 0
    assert store.remove_unreferenced({referenced}, older_than=-1) == 1
    assert contents(store.fetch(referenced)) == FILES
    with pytest.raises(ArtifactMissing):
        store.fetch(unreferenced)


def test_sweep_keeps_an_artifact_that_was_put_again(local):
    artifact = local.put(FILES)
    os.utime(local.fetch(artifact), (1, 1))
    local.put(FILES)
    assert local.remove_unreferenced((), older_than=60) == 0


def test_sweep_of_an_empty_store(store):
    assert store.remove_unreferenced((), 0) == 0


def test_the_registry_sweeps_unrecorded_artifacts(tmp_path, registry: Registry, make_spec):
    data, result, full_model, orphan = (registry.artifacts.put({"f": content}) for content in (b"1", b"2", b"3", b"4"))
    job_spec = make_spec()
    with registry.writing() as session:
        datasets.create(session, "acme", "f", data, 1, 1)
        job = jobs.submit(session, job_spec, {})
        jobs.lease(session, "worker", now=1.0, seconds=1.0, max_attempts=1)
        version = VersionRecord(
            id=result, adapter="acme/support", job=job.id, base=job_spec.base, bytes=1, created_at=1.0
        )
        jobs.publish(session, job.id, 1, version, result=full_model)
        assert adapters.get(session, "acme/support").champion == result
        assert tenants.list_tenants(session)
    assert registry.remove_unreferenced(older_than=-1) == 1
    for artifact in (data, result, full_model):
        registry.artifacts.fetch(artifact)
    with pytest.raises(ArtifactMissing):
        registry.artifacts.fetch(orphan)


def test_a_full_disk_leaves_nothing(local, tmp_path, monkeypatch):
    def full(_handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    artifact = local.put({"a": b"1"})
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DiskFull, match="free some space"):
        local.put(FILES)
    monkeypatch.undo()
    stored = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.parent.name for path in stored} == {artifact}


def test_a_store_whose_folder_cannot_be_created(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SetupError, match="artifacts_url"):
        ArtifactStore(str(tmp_path / "file" / "store")).put(FILES)


def test_a_url_with_an_unknown_protocol():
    with pytest.raises(SetupError, match="nosuch://"):
        ArtifactStore("nosuch://bucket")


def test_threads_may_put_the_same_files_at_once(store):
    with ThreadPoolExecutor(8) as pool:
        hashes = [result.result() for result in [pool.submit(store.put, FILES) for _ in range(8)]]
    assert len(set(hashes)) == 1
    assert contents(store.fetch(hashes[0])) == FILES


# For n = 1, 2, ...: forks a child that kills itself at its n-th call that changes the disk, until one completes.
KILLED = """
import os, pathlib, signal, sys
from loramill.registry.artifacts.store import ArtifactStore

def deadly(module, name):
    real = getattr(module, name)
    def call(*args, **options):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **options)
    setattr(module, name, call)

point, status = 0, -1
while status != 0:
    child = os.fork()
    if child == 0:
        left = point
        deadly(os, "fsync"), deadly(os, "utime"), deadly(pathlib.Path, "mkdir"), deadly(pathlib.Path, "rename")
        deadly(pathlib.Path, "open")
        ArtifactStore(f"{sys.argv[1]}/{point}").put({"a": b"1" * 5000, "b": b"2"})
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(status)
    point += 1
"""


def test_a_kill_in_the_middle_of_put_leaves_all_or_nothing(tmp_path):
    files = {"a": b"1" * 5000, "b": b"2"}
    artifact = ArtifactStore(str(tmp_path / "other")).put(files)
    killer = subprocess.run([sys.executable, "-c", KILLED, tmp_path], check=True, capture_output=True, text=True)
    statuses = [int(line) for line in killer.stdout.split()]
    assert statuses == [-9] * (len(statuses) - 1) + [0] and len(statuses) > 10
    complete = []
    for point in range(len(statuses)):
        store = ArtifactStore(str(tmp_path / str(point)))
        try:
            complete.append(contents(store.fetch(artifact)) == files)
        except ArtifactMissing:
            complete.append(False)
        assert store.put(files) == artifact
        store.remove_unreferenced({artifact}, older_than=-1)
        assert {path.parent.name for path in (tmp_path / str(point)).rglob("*") if path.is_file()} == {artifact}
    assert complete == sorted(complete) and 0 < sum(complete) < len(complete)
