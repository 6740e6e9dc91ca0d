"""The machine: memory limits, folders for sockets and shared memory, proxies to bypass."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from loramill.client.http import is_local_url
from loramill.errors import NotEnoughMemory, SetupError
from loramill.local import machine
from loramill.local.machine import (
    MachineMemory,
    check_memory,
    free_memory,
    object_store_folder,
    required_memory,
    socket_folder,
)
from loramill.models.catalog import Base
from loramill.settings import Settings

GB = 10**9


def system(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMINFO = "MemTotal:  16000000 kB\nMemFree: 1 kB\nMemAvailable:    8000000 kB\nSwapFree:  1000000 kB\n"
V2 = {
    "proc/meminfo": MEMINFO,
    "proc/self/cgroup": "0::/system.slice/a.service\n",
    "sys/fs/cgroup/system.slice/a.service/memory.max": "max\n",
    "sys/fs/cgroup/system.slice/a.service/memory.current": "1\n",
    "sys/fs/cgroup/system.slice/a.service/memory.stat": "inactive_file 0\n",
    "sys/fs/cgroup/system.slice/memory.max": f"{4 * GB}\n",
    "sys/fs/cgroup/system.slice/memory.current": f"{3 * GB}\n",
    "sys/fs/cgroup/system.slice/memory.stat": f"anon 5\ninactive_file {GB}\n",
}
V1 = {
    "proc/meminfo": MEMINFO,
    "proc/self/cgroup": "5:cpu,cpuacct:/docker/a\n4:memory:/docker/a\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{3 * GB}\n",
    "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{GB}\n",
    "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 0\n",
}
UNLIMITED = {**V1, "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"}


@pytest.mark.parametrize(
    ("files", "free", "bound"),
    [
        ({"proc/meminfo": MEMINFO}, 9_000_000 << 10, "this machine"),
        (V2, 2 * GB, "4.0 GB"),
        (V1, 2 * GB, "3.0 GB"),
        (UNLIMITED, 9_000_000 << 10, "this machine"),
    ],
)
def test_the_lowest_limit_counts(tmp_path: Path, files: dict[str, str], free: int, bound: str) -> None:
    found = free_memory(system(tmp_path, files))
    assert found is not None and found.free_bytes == free and bound in found.limited_by


def test_unknown_memory_is_not_refused(tmp_path: Path, base: Base) -> None:
    assert free_memory(tmp_path) is None
    check_memory(base, Settings(), None)


def test_too_little_memory_is_refused_with_the_figures(base: Base) -> None:
    with pytest.raises(NotEnoughMemory, match=r"^2\.0 GB of memory is free .* needs 2\.6 GB for the base smollm2"):
        check_memory(base, Settings(), MachineMemory(2 * GB, "this machine"))
    check_memory(base, Settings(), MachineMemory(3 * GB, "this machine"))


def test_required_memory_excludes_weights_that_are_on_a_gpu(base: Base) -> None:
    weights = 134_515_008 * 2
    on_gpu = Settings(serve={"device": "cuda"}, jobs={"use_gpu": True})
    assert required_memory(base, Settings()) - required_memory(base, on_gpu) == 2 * weights


def test_sockets_go_where_their_paths_fit(tmp_path: Path) -> None:
    deep = tmp_path / ("a" * 60) / ("b" * 60)
    deep.mkdir(parents=True)
    folder = socket_folder([None, str(deep)])
    assert folder != deep and (folder / "ray").is_dir()
    assert len(os.fsencode(folder)) + machine._SESSION_BYTES <= machine.SOCKET_PATH_BYTES


def test_without_a_folder_for_sockets_the_limit_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_is_writable", lambda folder: False)
    with pytest.raises(SetupError, match=r"longer than 39 bytes\. Set RAY_TMPDIR"):
        socket_folder([str(tmp_path)])


def test_another_users_folder_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "SOCKET_PATH_BYTES", 1000)
    (tmp_path / "ray").write_text("no folder")
    assert socket_folder([str(tmp_path)]) == tmp_path / f"ray-{os.getuid()}"


def test_the_object_store_avoids_small_or_missing_shared_memory(tmp_path: Path) -> None:
    assert object_store_folder(1, tmp_path, shared=tmp_path) is None
    assert object_store_folder(1 << 62, tmp_path, shared=tmp_path) == tmp_path
    assert object_store_folder(1, tmp_path, shared=tmp_path / "nowhere") == tmp_path


def test_only_local_traffic_bypasses_the_proxy() -> None:
    proxies = {"https_proxy": "http://proxy:3128", "NO_PROXY": "intranet.example, 127.0.0.1", "HOME": "/home/a"}
    made = machine.bypass_proxy(proxies, machine.local_addresses())
    assert made["https_proxy"] == "http://proxy:3128" and made["HOME"] == "/home/a"
    assert made["grpc_proxy"] == ""
    listed = made["no_proxy"].split(",")
    assert made["NO_PROXY"] == made["no_proxy"] and len(set(listed)) == len(listed)
    assert {"intranet.example", "localhost", "127.0.0.1", "::1"} <= set(listed)
    assert machine.bypass_proxy({"no_proxy": "*"}, ["a"])["NO_PROXY"] == "*"


def test_the_addresses_of_this_machine_are_its_own() -> None:
    addresses = [address for address in machine.local_addresses() if address[0].isdigit()]
    assert all(is_local_url(f"http://{address}:8400/v1") for address in addresses)
    assert (
        is_local_url("http://[::1]:8400")
        and not is_local_url("http://192.0.2.77:8400")
        and not is_local_url("https://gateway.example")
    )


@pytest.mark.parametrize(
    ("host", "address"),
    [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("::", "[::1]"), ("gpu.example", "gpu.example")],
)
def test_a_gateway_that_listens_everywhere_is_called_on_the_loopback(host: str, address: str) -> None:
    assert Settings(serve={"host": host}).address == f"http://{address}:8400"
