"""Checks of this machine for `loramill up`: memory, folders for sockets and shared memory, network addresses."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from loramill.errors import NotEnoughMemory, SetupError
from loramill.models.catalog import Base
from loramill.settings import Settings

#: Memory of one process with torch, and of Ray's own processes, the gateway and the supervisor together, in bytes. PSS
#: with the built-in base: 790 MB for the engine, weights included, and 1080 MB for everything else.
PROCESS_BYTES = 500 * 10**6
OVERHEAD_BYTES = 1100 * 10**6

#: The longest path of a Unix socket on Linux; macOS has 103.
SOCKET_PATH_BYTES = 107 if os.uname().sysname == "Linux" else 103
#: Length of the path that Ray appends to its folder.
_SESSION_BYTES = len("/ray/session_2026-11-29_15-24-08_659737_4194304/sockets/plasma_store")


@dataclass(frozen=True, slots=True)
class MachineMemory:
    """Free memory in bytes, and a description of its limit."""

    free_bytes: int
    limited_by: str


def free_memory(root: Path = Path("/")) -> MachineMemory | None:
    """Returns the memory that this process can still use, including swap; None if the system does not report it.

    Limits of containers and services (cgroup v1 or v2, at any level) are taken into account.
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        known = {name: int(rest.split()[0]) << 10 for name, _, rest in (line.partition(":") for line in lines)}
        found = [MachineMemory(known["MemAvailable"] + known.get("SwapFree", 0), "this machine")]
    except (OSError, KeyError, ValueError, IndexError):
        return None
    return min([*found, *_cgroup_memory(root)], key=lambda memory: memory.free_bytes)


def _cgroup_memory(root: Path) -> Iterator[MachineMemory]:
    """Yields the free memory of each cgroup limit of this process; the page cache counts as free."""
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    mounted = root / "sys/fs/cgroup"
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, names = mounted, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top = mounted / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(top) and (memory := _read_limit(folder, *names)):
                yield memory


def _read_limit(folder: Path, limit: str, used: str, droppable: str) -> MachineMemory | None:
    try:
        limit_bytes = int((folder / limit).read_text())  # ValueError for "max", no limit
        used_bytes = int((folder / used).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    if limit_bytes >= 1 << 60:  # how v1 writes "no limit"
        return None
    return MachineMemory(
        max(0, limit_bytes - used_bytes + int(stat.get(droppable, 0))),
        f"limit of {limit_bytes / 1e9:.1f} GB in {folder}",
    )


def required_memory(base: Base, settings: Settings) -> int:
    """Returns the bytes that an engine replica, one training session and the other processes need at start."""
    from loramill.sizing.anatomy import anatomy, read_config
    from loramill.sizing.memory import base_bytes

    weights = base_bytes(anatomy(read_config(str(base.folder))), base.quantization, "cpu")
    on_cpu = (settings.serve.device != "cuda") + (not settings.jobs.on_gpu)
    return OVERHEAD_BYTES + 2 * PROCESS_BYTES + on_cpu * weights


def check_memory(base: Base, settings: Settings, memory: MachineMemory | None) -> None:
    """Raises NotEnoughMemory if the free memory does not suffice for `loramill up`."""
    needed = required_memory(base, settings)
    if memory is not None and memory.free_bytes < needed:
        raise NotEnoughMemory(
            f"{memory.free_bytes / 1e9:.1f} GB of memory is free ({memory.limited_by}), and `loramill up` needs "
            f"{needed / 1e9:.1f} GB for the base {base.name}: end other programs, raise the limit, or use a "
            "smaller base."
        )


def socket_folder(preferred: Sequence[str | None] = ()) -> Path:
    """Returns a writable folder whose path is short enough for Ray's sockets.

    Args:
        preferred: Folders to try first; None is skipped.

    Raises:
        SetupError: There is none; the message gives the maximum length of its path.
    """
    max_bytes = SOCKET_PATH_BYTES - _SESSION_BYTES
    tried = [*filter(None, preferred), "/tmp", "/var/tmp", "/dev/shm"]
    for folder in map(Path, dict.fromkeys(tried)):
        for candidate in (folder, folder / f"ray-{os.getuid()}"):  # another user may own "ray"
            if len(os.fsencode(candidate)) <= max_bytes and _is_writable(candidate / "ray"):
                return candidate
    raise SetupError(
        f"No folder can hold Ray's sockets: {', '.join(dict.fromkeys(tried))} are not writable, or have paths "
        f"longer than {max_bytes} bytes. Set RAY_TMPDIR to a writable folder with a shorter path."
    )


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o777)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def object_store_folder(size: int, fallback: Path, shared: Path = Path("/dev/shm")) -> Path | None:
    """Returns the folder for Ray's object store of `size` bytes; None for shared memory, if it is large enough.

    Containers have 64 MB of shared memory by default, or none. loramill puts little into the store, so `fallback`, a
    folder on disk, is fast enough.
    """
    try:
        enough = shutil.disk_usage(shared).free >= size and os.access(shared, os.W_OK)
    except OSError:
        enough = False
    return None if enough else fallback


def c_compiler() -> str | None:
    """Returns the C compiler for the native kernels (CC, cc, gcc or clang), or None."""
    return next(filter(None, map(shutil.which, (os.environ.get("CC", ""), "cc", "gcc", "clang"))), None)


def local_addresses() -> tuple[str, ...]:
    """Returns the names and addresses of this machine."""
    found = ["localhost", "127.0.0.1", "::1"]
    for family, elsewhere in ((socket.AF_INET, "8.8.8.8"), (socket.AF_INET6, "2001:4860:4860::8888")):
        # The address of the outgoing interface, as Ray determines it; no packet is sent.
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((elsewhere, 9))
                found.append(probe.getsockname()[0])
            except OSError:
                continue
    name = socket.gethostname()
    try:
        found += [name, *{str(entry[4][0]) for entry in socket.getaddrinfo(name, None)}]
    except OSError:
        found.append(name)
    return tuple(dict.fromkeys(found))


def bypass_proxy(environment: Mapping[str, str], addresses: Sequence[str]) -> dict[str, str]:
    """Returns the environment with proxies bypassed for these addresses and for gRPC.

    Other traffic (a model hub, an object store, an experiment tracker) uses the proxies as before.
    """
    listed = [environment.get(name, "") for name in ("no_proxy", "NO_PROXY")]
    parts = [part.strip() for text in listed for part in text.split(",")]
    value = "*" if "*" in parts else ",".join(dict.fromkeys([*filter(None, parts), *addresses]))
    # An empty value disables the proxy for gRPC, which then ignores the other variables.
    return {**environment, "no_proxy": value, "NO_PROXY": value, "grpc_proxy": ""}
