"""The child process of `loramill up` that runs the cluster: its start and its end, its environment, and its health.

It reads its settings from standard input and ends when that is closed, so that it can't outlive its parent; Ray's own
processes end with it. Until then it holds a lock, for which the next `up` waits.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import httpx

from loramill.errors import Conflict
from loramill.gpus import ONLY_ASSIGNED_GPUS
from loramill.local.machine import bypass_proxy, local_addresses, socket_folder
from loramill.local.up_log import ClusterLog
from loramill.settings import Settings
from loramill.storage.locks import try_lock

START_SECONDS = 300.0
UNHEALTHY_SECONDS = 60.0
STOP_SECONDS = 45.0
#: How long a start may take after its first error; a retry that succeeds has done so by then.
ERROR_GRACE_SECONDS = 15.0

#: Python arguments of the child process.
CLUSTER = ("-m", "loramill.pipelines.cluster.deploy")

#: Settings of Ray for one machine: its own token, no usage reports, fast detection of failures.
RAY_ENVIRONMENT = ONLY_ASSIGNED_GPUS | {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # Period of Serve's control loop; its default, ten times per second, takes 3% of a core.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.3",
    # Ray raises the niceness of all workers, which delays answers under load; training lowers its own priority.
    "RAY_worker_niceness": "0",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "10",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # The log is a file: no colors, and every line of every process (`up_log` suppresses repetitions).
    "RAY_COLOR_PREFIX": "0",
    "RAY_DEDUP_LOGS": "0",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


@contextlib.contextmanager
def run_cluster(settings: Settings) -> Iterator[tuple[subprocess.Popen[bytes], ClusterLog]]:
    """Starts the child process that runs the cluster; afterwards ends it, killing it only after a timeout."""
    with cluster_lock(settings) as lock:
        cluster = subprocess.Popen(
            [sys.executable, "-u", *CLUSTER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=settings.home / "run",  # Ray puts this folder on its workers' path
            pass_fds=[lock.fileno()],
            env=environment(),
            start_new_session=True,  # Ctrl-C must reach only the parent, which then ends the child
        )
    assert cluster.stdin is not None and cluster.stdout is not None
    log = ClusterLog(log_path(settings), cluster.stdout, cluster.pid)
    try:
        with contextlib.suppress(BrokenPipeError):  # it has ended already; its log gives the reason
            cluster.stdin.write(settings.model_dump_json().encode() + b"\n")
            cluster.stdin.flush()
        yield cluster, log
    finally:
        with contextlib.suppress(BrokenPipeError):
            cluster.stdin.close()
        try:
            cluster.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            cluster.kill()
            cluster.wait()
        log.close(5.0)


def environment() -> dict[str, str]:
    """Returns the environment of the cluster, without the settings, which the child reads from standard input."""
    kept = {"LORAMILL_KERNELS"}  # not a setting; the kernels read it
    inherited = {name: value for name, value in os.environ.items() if name in kept or not name.startswith("LORAMILL_")}
    own = {"RAY_AUTH_TOKEN": secrets.token_hex(16), "RAY_TMPDIR": str(ray_folder())}
    return bypass_proxy({**inherited, **RAY_ENVIRONMENT, **own}, local_addresses())


def ray_folder() -> Path:
    """Returns the folder for Ray's sessions and their sockets.

    Raises:
        SetupError: No folder is usable.
    """
    return socket_folder([os.environ.get("RAY_TMPDIR"), os.environ.get("TMPDIR")])


@contextlib.contextmanager
def cluster_lock(settings: Settings) -> Iterator[IO[str]]:
    """Holds the lock of the cluster's process, after a previous one has ended.

    Raises:
        Conflict: The previous process does not end.
    """
    with (settings.home / "run" / "cluster.lock").open("a") as lock:
        deadline = time.monotonic() + STOP_SECONDS
        while not try_lock(lock):
            if time.monotonic() > deadline:
                raise Conflict(f"The cluster of an earlier `up` on {settings.home} still runs; end its processes.")
            time.sleep(0.2)
        yield lock


def wait_ready(settings: Settings, cluster: subprocess.Popen[bytes], stop: threading.Event, log: ClusterLog) -> bool:
    """Waits until the gateway answers; returns False after a timeout, an error, or once `stop` is set."""
    deadline, failed_at = time.monotonic() + START_SECONDS, float("inf")
    with httpx.Client(trust_env=False) as client:  # a proxy can't reach this machine
        while not stop.wait(0.1) and cluster.poll() is None and time.monotonic() < deadline:
            if is_answering(client, settings):
                return True
            if log.failed:
                failed_at = min(failed_at, time.monotonic())
            if time.monotonic() - failed_at > ERROR_GRACE_SECONDS:
                break
    return False


def wait_unhealthy(settings: Settings, cluster: subprocess.Popen[bytes], stop: threading.Event) -> None:
    """Waits until the child ends, the gateway or its engine stops answering, or `stop` is set.

    An outage of the database does not count: a restart would not end it, and the cluster's processes wait for it.
    """
    last_healthy = time.monotonic()
    # One client for all requests, since creating one takes longer than a request.
    with httpx.Client(trust_env=False) as client:
        while not stop.wait(2.0) and cluster.poll() is None:
            if is_answering(client, settings, "/health"):
                last_healthy = time.monotonic()
            elif time.monotonic() - last_healthy > UNHEALTHY_SECONDS:
                cluster.kill()
                return


def is_answering(client: httpx.Client, settings: Settings, path: str = "/readyz") -> bool:
    """Whether the gateway and an engine answer; with `/readyz`, also the database."""
    try:
        return client.get(f"{settings.address}{path}", timeout=5.0).status_code == 200
    except httpx.HTTPError:
        return False


def failure_reason(settings: Settings, cluster: subprocess.Popen[bytes], log: ClusterLog) -> str:
    """Returns why the cluster is not up, as a sentence: the first error in its log."""
    if cluster.poll() is not None:
        log.close(5.0)  # its last lines may not have arrived yet
    reason = log.reason
    if reason is None and cluster.returncode is not None:
        reason = f"its process ended with status {cluster.returncode}"
    elif reason is None:
        reason = f"nothing answered at {settings.address} within {START_SECONDS:.0f} s"
    return reason if reason.endswith((".", "!", "?")) else f"{reason}."


def log_path(settings: Settings) -> Path:
    """Returns the log file of the cluster's processes."""
    return settings.home / "logs" / "up.log"
