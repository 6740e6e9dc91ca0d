"""`loramill up` and `loramill down`: the cluster on this machine, supervised by one small process.

The supervising process holds a lock on `<home>/up.lock` and runs the cluster (Ray, the gateway, the engine, the
training sessions) as one child process. If the child dies, it is started again; the registry, the checkpoints and the
versions are on disk, so that work resumes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.markup import escape

from loramill.data.encoding import limitations
from loramill.data.tokenizer import ChatTokenizer
from loramill.errors import Conflict, LoramillError, SetupError
from loramill.gpus.machine import list_gpus
from loramill.local import background
from loramill.local.cluster_process import (
    STOP_SECONDS,
    cluster_lock,
    failure_reason,
    log_path,
    ray_folder,
    run_cluster,
    wait_ready,
    wait_unhealthy,
)
from loramill.local.gpus import check_gpu_memory, choose_devices
from loramill.local.machine import c_compiler, check_memory, free_memory
from loramill.local.preparation import (
    check_port,
    check_stores,
    describe_other_bases,
    ensure_admin_key,
    prepare_cache,
    prepare_home,
)
from loramill.models.catalog import Base, find_base
from loramill.registry.database.migrate import migrate
from loramill.settings import Settings
from loramill.storage.atomic import replace_text
from loramill.storage.locks import try_lock

#: A warning only; a compiler is not required.
NO_COMPILER = (
    "There is no C compiler: adapters are computed with plain torch operations, which are slower; install gcc."
)


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


def print_greeting(settings: Settings, console: Console, base: str, stop_with: str) -> None:
    """Prints the address, the files and how to stop."""
    console.print(f"[bold]loramill is up[/bold] at {settings.address}/v1 with the base {base}.", soft_wrap=True)
    for what, where in (
        ("admin key", settings.admin_key_file),
        ("log", log_path(settings)),
        ("stop it with", stop_with),
    ):
        console.print(f"  {what:<14}{where}", soft_wrap=True)
