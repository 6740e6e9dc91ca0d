"""What `loramill up` needs of this machine: memory, a folder for sockets, shared memory, and its own addresses."""

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

#: Bytes of a process with torch, and of Ray's own processes, the gateway and the supervisor together. Measured as PSS
#: with the built-in base: 790 MB for the engine, weights included, and 1080 MB for everything else.
PROCESS_BYTES = 500 * 10**6
OVERHEAD_BYTES = 1100 * 10**6

#: The longest path of a Unix socket on Linux; macOS has 103.
SOCKET_PATH_BYTES = 107 if os.uname().sysname == "Linux" else 103
#: What Ray adds to its folder: /ray/session_2026-11-29_15-24-08_659737_4194304/sockets/plasma_store
_SESSION_BYTES = len("/ray/session_2026-11-29_15-24-08_659737_4194304/sockets/plasma_store")


@dataclass(frozen=True, slots=True)
class MachineMemory:
    """Free memory in bytes, and what limits it."""

    free_bytes: int
    limited_by: str


def free_memory(root: Path = Path("/")) -> MachineMemory | None:
    """The memory that this process and its children can still use, swap included; None if the system doesn't report it.

    A container's or a service's limit (cgroup v1 or v2, at any level) counts as the machine's memory does.
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        known = {name: int(rest.split()[0]) << 10 for name, _, rest in (line.partition(":") for line in lines)}
        found = [MachineMemory(known["MemAvailable"] + known.get("SwapFree", 0), "this machine")]
    except (OSError, KeyError, ValueError, IndexError):
        return None
    return min([*found, *_cgroup_memory(root)], key=lambda memory: memory.free_bytes)


def _cgroup_memory(root: Path) -> Iterator[MachineMemory]:
    """What each cgroup limit of this process leaves; file pages that can be dropped don't count as used."""
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
        most = int((folder / limit).read_text())  # "max" is no limit
        now = int((folder / used).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    if most >= 1 << 60:  # how v1 writes "no limit"
        return None
    return MachineMemory(
        max(0, most - now + int(stat.get(droppable, 0))), f"the limit of {most / 1e9:.1f} GB in {folder}"
    )


def required_memory(base: Base, settings: Settings) -> int:
    """Bytes that an engine replica of this base, one training session, and the other processes need at the start."""
    from loramill.sizing.anatomy import anatomy, read_config
    from loramill.sizing.memory import base_bytes

    weights = base_bytes(anatomy(read_config(str(base.folder))), base.quantization, "cpu")
    on_cpu = (settings.serve.device != "cuda") + (not settings.jobs.use_gpu)
    return OVERHEAD_BYTES + 2 * PROCESS_BYTES + on_cpu * weights


def check_memory(base: Base, settings: Settings, memory: MachineMemory | None) -> None:
    """Raises NotEnoughMemory if `loramill up` can't run in the free memory."""
    needed = required_memory(base, settings)
    if memory is not None and memory.free_bytes < needed:
        raise NotEnoughMemory(
            f"{memory.free_bytes / 1e9:.1f} GB of memory are free ({memory.limited_by}), and `loramill up` needs "
            f"{needed / 1e9:.1f} GB for the base {base.name}: end other programs, raise the limit, or use a "
            "smaller base."
        )


def socket_folder(preferred: Sequence[str | None] = ()) -> Path:
    """A folder that can be written to, and whose path leaves room for Ray's sockets.

    Args:
        preferred: what to try first; None is skipped.

    Raises:
        SetupError: there is none; the message says how long its path may be.
    """
    most = SOCKET_PATH_BYTES - _SESSION_BYTES
    tried = [*filter(None, preferred), "/tmp", "/var/tmp", "/dev/shm"]
    for folder in map(Path, dict.fromkeys(tried)):
        for candidate in (folder, folder / f"ray-{os.getuid()}"):  # another user's "ray" may be closed to us
            if len(os.fsencode(candidate)) <= most and _is_writable(candidate / "ray"):
                return candidate
    raise SetupError(
        f"No folder can hold Ray's sockets: {', '.join(dict.fromkeys(tried))} can't be written to, or have paths "
        f"longer than {most} bytes. Set RAY_TMPDIR to a folder that you may write to, with a shorter path."
    )


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o777)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def object_store_folder(size: int, fallback: Path, shared: Path = Path("/dev/shm")) -> Path | None:
    """The folder for Ray's object store of `size` bytes; None is shared memory, Ray's default, if it has enough room.

    A container has 64 MB of it by default, or none. Little goes through the store here, so that `otherwise`, a folder
    on disk, is good enough.
    """
    try:
        enough = shutil.disk_usage(shared).free >= size and os.access(shared, os.W_OK)
    except OSError:
        enough = False
    return None if enough else fallback


def c_compiler() -> str | None:
    """The C compiler that the native kernels are compiled with: CC, cc, gcc or clang; None if there is none."""
    return next(filter(None, map(shutil.which, (os.environ.get("CC", ""), "cc", "gcc", "clang"))), None)


def local_addresses() -> tuple[str, ...]:
    """Names and addresses under which this machine's processes reach one another."""
    found = ["localhost", "127.0.0.1", "::1"]
    for family, elsewhere in ((socket.AF_INET, "8.8.8.8"), (socket.AF_INET6, "2001:4860:4860::8888")):
        # As Ray finds a node's address: that of the way out. No packet is sent for it.
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
    """The environment in which traffic to these addresses, and all gRPC, bypasses the proxies.

    Other traffic (a model hub, an object store, an experiment tracker) uses the proxies as before.
    """
    listed = [environment.get(name, "") for name in ("no_proxy", "NO_PROXY")]
    parts = [part.strip() for text in listed for part in text.split(",")]
    value = "*" if "*" in parts else ",".join(dict.fromkeys([*filter(None, parts), *addresses]))
    # An empty proxy is none for gRPC, which then looks at no other variable.
    return {**environment, "no_proxy": value, "NO_PROXY": value, "grpc_proxy": ""}
