"""`loramill up` and `loramill down`: the cluster on this machine, supervised by one small process.

The supervising process holds a lock on `<home>/up.lock` and runs the cluster (Ray, the gateway, the engine, the
training sessions) as one child process. If the child dies, it is started again; the registry, the checkpoints and the
versions are on disk, so that work resumes. The child reads its settings from standard input and ends when that is
closed, so that it can't outlive its parent; Ray's own processes end with the child. Until then the child holds its own
lock, for which the next `up` waits.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

import httpx
from rich.console import Console
from rich.markup import escape

from loramill.data.encoding import limitations
from loramill.data.tokenizer import ChatTokenizer
from loramill.errors import Conflict, DiskFull, LoramillError, PortTaken, SetupError, Unauthenticated
from loramill.gpus import ONLY_ASSIGNED_GPUS
from loramill.gpus.machine import list_gpus
from loramill.local import background
from loramill.local.gpus import check_gpu_memory, choose_devices
from loramill.local.machine import bypass_proxy, c_compiler, check_memory, free_memory, local_addresses, socket_folder
from loramill.local.up_log import ClusterLog
from loramill.models.catalog import Base, find_base
from loramill.plural import counted
from loramill.registry import Registry, api_keys
from loramill.registry.database.migrate import migrate
from loramill.registry.jobs import queue
from loramill.settings import Settings
from loramill.storage.atomic import replace_text
from loramill.storage.locks import try_lock
from loramill.storage.object_store import check_store

START_SECONDS = 300.0
UNHEALTHY_SECONDS = 60.0
STOP_SECONDS = 45.0
#: How long a start may take after its first error; a retry that succeeds has done so by then.
ERROR_GRACE_SECONDS = 15.0
FREE_BYTES = 1 << 30

#: A warning only; a compiler is not required.
NO_COMPILER = (
    "There is no C compiler: adapters are computed with plain torch operations, which are slower; install gcc."
)

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


def up(
    settings: Settings,
    *,
    console: Console,
    on_ready: Callable[[], None] = lambda: None,
    stop_with: str = "Ctrl-C or `loramill down`",
) -> None:
    """Runs everything on this machine until Ctrl-C, SIGTERM or `down`.

    Args:
        settings: The settings.
        console: Shows the progress.
        on_ready: Called when the gateway first answers, and after each restart of the cluster.
        stop_with: How the user stops it, for the greeting.

    Raises:
        SetupError, Conflict: This machine can't run the cluster; nothing was started.
    """
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    prepare_home(settings.home)
    prepare_cache(settings.cache)
    ray_folder()
    with home_lock(settings):
        try:
            base = prepare(settings, console)
            settings = place_on_devices(base, settings, console)
        except LoramillError:
            if not stop.is_set():  # otherwise Ctrl-C made it fail
                raise
        else:

            def ready() -> None:
                print_greeting(settings, console, base.name, stop_with)
                on_ready()

            supervise(settings, console, stop, ready)
        settings.address_file.unlink(missing_ok=True)
        console.print("Stopped. `loramill up` resumes.")


def prepare(settings: Settings, console: Console) -> Base:
    """Checks the machine, opens the registry and the base, and prints warnings about them.

    Raises:
        SetupError, Conflict: This machine can't run the cluster.
    """
    with console.status("Waiting for the cluster of the previous `up` to end…"), cluster_lock(settings):
        check_port(settings)
    with console.status("Checking the artifact store…"):
        check_stores(settings)
    with console.status("Opening the registry…"):
        migrate(settings.database)
        ensure_admin_key(settings)
    base = prepare_base(settings, console)
    for line in describe_other_bases(settings, base):
        console.print(line, soft_wrap=True)
    if c_compiler() is None:
        console.print(f"[yellow]{NO_COMPILER}[/yellow]", soft_wrap=True)
    return base


def place_on_devices(base: Base, settings: Settings, console: Console) -> Settings:
    """Decides on which devices engines and sessions run, and prints what was decided about GPUs.

    Raises:
        SetupError: The settings require a GPU that this machine does not have, or there is too little memory.
    """
    gpus = list_gpus()
    decision = choose_devices(settings, gpus, base.architecture)
    if decision.explanation is not None:
        console.print(decision.explanation, soft_wrap=True, markup=False)
    check_memory(base, decision.settings, free_memory())
    check_gpu_memory(base, decision.settings, gpus)
    return decision.settings


def prepare_base(settings: Settings, console: Console) -> Base:
    """Finds the base, converts it if necessary, and prints the limits of its chat template.

    Raises:
        BaseUnusable: The base can't be served, or its chat template is broken.
        DiskFull: The disk has no space for the conversion or the download.
    """
    with console.status(f"Preparing the base {settings.base}…"):
        base = find_base(settings.base, settings.cache, settings.quantization)
        limits = limitations(ChatTokenizer.load(base.folder))
    for limit in limits:
        console.print(f"[yellow]{escape(limit)}[/yellow]", soft_wrap=True)
    return base


def up_in_background(settings: Settings, *, console: Console) -> None:
    """Runs `up` in a background process; returns when the gateway answers.

    Raises:
        LoramillError: `up` failed; nothing is running.
    """
    prepare_home(settings.home)
    output = settings.home / "logs" / "watcher.log"
    started = background.start(
        lambda ready: up(settings, console=Console(highlight=False), on_ready=ready, stop_with="`loramill down`"),
        output,
    )
    with console.status("Starting…"):
        started.wait_ready()
    console.print(output.read_text().rstrip(), soft_wrap=True, markup=False)


def down(settings: Settings) -> bool:
    """Stops the `up` of this home, if it runs; returns whether it did.

    Raises:
        SetupError: It did not end in time.
    """
    path = settings.home / "up.lock"
    if not path.exists():
        return False
    with path.open() as lock:
        if try_lock(lock):
            return False
        pid = int(lock.read().split()[0])
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS + 15
        while not try_lock(lock):
            if time.monotonic() > deadline:
                raise SetupError(f"Process {pid} did not stop in time; end it with `kill -9 {pid}`.")
            time.sleep(0.2)
    return True


def supervise(settings: Settings, console: Console, stop: threading.Event, on_ready: Callable[[], None]) -> None:
    """Runs the cluster until `stop` is set, restarting it after failures; calls `on_ready` after each start.

    Raises:
        SetupError: The cluster did not start; the message has the first error.
    """
    pause, started_once = 1.0, False
    while not stop.is_set():
        with run_cluster(settings) as (cluster, log):
            with console.status("Starting Ray, the gateway and the engine…"):
                ready = wait_ready(settings, cluster, stop, log)
            if ready:
                pause, started_once = 1.0, True
                replace_text(settings.address_file, settings.address + "\n")
                on_ready()
                wait_unhealthy(settings, cluster, stop)
            if stop.is_set():
                console.print("Stopping…")
                return
            failed = failure_reason(settings, cluster, log)
            if not ready:
                cluster.kill()  # it would keep retrying
        if not started_once:
            raise SetupError(f"The cluster did not start: {failed} See {log_path(settings)}.")
        console.print(f"The cluster failed (see {log_path(settings)}); restarting it in {pause:.0f} s.")
        stop.wait(pause)
        pause = min(pause * 2, 30.0)


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


def print_greeting(settings: Settings, console: Console, base: str, stop_with: str) -> None:
    """Prints the address, the files and how to stop."""
    console.print(f"[bold]loramill is up[/bold] at {settings.address}/v1 with the base {base}.", soft_wrap=True)
    for what, where in (
        ("admin key", settings.admin_key_file),
        ("log", log_path(settings)),
        ("stop it with", stop_with),
    ):
        console.print(f"  {what:<14}{where}", soft_wrap=True)


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


def prepare_home(home: Path) -> None:
    """Creates the home folder, readable only by its owner.

    Raises:
        SetupError, DiskFull: The folder is not writable, or the disk is full.
    """
    try:
        for folder in ("logs", "run"):
            (home / folder).mkdir(parents=True, exist_ok=True)
        home.chmod(0o700)
    except OSError as error:
        raise SetupError(
            f"The home folder {home} is not writable ({error.strerror}); set LORAMILL_HOME to another folder."
        ) from error
    free = shutil.disk_usage(home).free
    if free < FREE_BYTES:
        raise DiskFull(
            f"{home} has {free >> 20} MiB free and loramill needs 1024: free some space, or move LORAMILL_HOME."
        )


def prepare_cache(cache: Path) -> None:
    """Creates the folder for converted bases; raises SetupError if it is not writable."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            pass
    except OSError as error:
        raise SetupError(
            f"The cache folder {cache} is not writable ({error.strerror}); set LORAMILL_CACHE to another folder."
        ) from error


@contextlib.contextmanager
def home_lock(settings: Settings) -> Iterator[None]:
    """Holds the lock of the home folder; the lock file contains the id of this process.

    Raises:
        Conflict: Another `up` runs on this home.
    """
    with (settings.home / "up.lock").open("a+") as lock:
        if not try_lock(lock):
            lock.seek(0)
            pid = lock.read().split()[0]
            raise Conflict(f"loramill is already up on {settings.home} (process {pid}); `loramill down` stops it.")
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield


def check_port(settings: Settings) -> None:
    """Raises PortTaken if the gateway can't listen on the address of the settings."""
    host, port = settings.serve.host, settings.serve.port
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise PortTaken(
            f"{host}:{port} is not available ({error.strerror}): end the program that uses it, or choose another "
            "with `loramill up --port` (or `--host`)."
        ) from error


def ensure_admin_key(settings: Settings) -> None:
    """Ensures that the home folder has an admin key that the registry knows; creates one if necessary."""
    registry, path = Registry.open(settings.database, settings.artifacts), settings.admin_key_file
    if path.exists():
        with registry.reading() as session, contextlib.suppress(Unauthenticated):
            api_keys.authenticate(session, path.read_text().strip())
            return
    with registry.writing() as session:
        _, secret = api_keys.create(session, None)
        replace_text(path, secret + "\n", mode=0o600)


def check_stores(settings: Settings) -> None:
    """Writes, reads and deletes a small object in each of the three stores.

    Raises:
        SetupError: The URL of a store can't be opened. StoreUnusable: A store can't be used.
    """
    for url in (settings.artifacts, settings.checkpoints, settings.sessions):
        check_store(url)


def describe_other_bases(settings: Settings, base: Base) -> Sequence[str]:
    """Describes the jobs and adapters whose base is neither this one nor in `serve.bases`, one line each.

    Raises:
        DatabaseUnusable: The database can't be read.
        BaseUnusable: A base of `serve.bases` can't be found.
    """
    served = [find_base(name, settings.cache, settings.quantization).fingerprint for name in settings.serve.bases]
    registry = Registry.open(settings.database, settings.artifacts)
    try:
        with registry.reading() as session:
            waiting, unserved = queue.count_other_bases(session, base.fingerprint, served)
    finally:
        registry.close()
    lines = []
    if waiting:
        lines.append(
            f"{counted(waiting, 'job')} for other bases than {base.name}: queued until these bases are served."
        )
    if unserved:
        lines.append(
            f"{counted(unserved, 'adapter')} for other bases than {base.name}: 404 until these bases are served."
        )
    return lines


def log_path(settings: Settings) -> Path:
    """Returns the log file of the cluster's processes."""
    return settings.home / "logs" / "up.log"
