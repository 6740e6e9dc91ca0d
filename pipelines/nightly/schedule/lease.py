"""The lease of the process that works on a nightly run: it is extended in a thread while the process lives."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loramill.errors import LeaseLost, LoramillError
from loramill.registry import Registry, nightly, nightly_schedule
from loramill.types import NightlyRun

#: How long a process may be silent before another one takes its run over. The database may be away for a minute.
LEASE_SECONDS = 60.0
#: Seconds between two extensions.
HEARTBEAT_SECONDS = 10.0
log = logging.getLogger(__name__)


@contextmanager
def leased_run(registry: Registry) -> Iterator[NightlyRun]:
    """Leases the open run, or a new one, until the block ends.

    Raises:
        NightlyBusy: another process works on it.
    """
    holder = process_name()
    with registry.reading() as session:
        last = next(iter(nightly.list_runs(session, limit=1)), None)
    dead = last.holder if last is not None and last.holder is not None and is_dead(last.holder) else None
    with registry.writing() as session:
        run = nightly_schedule.lease_run(session, holder, now=time.time(), seconds=LEASE_SECONDS, dead_holder=dead)
    ended = threading.Event()
    thread = threading.Thread(target=_extend, args=(registry, run.id, holder, ended), name="nightly lease", daemon=True)
    thread.start()
    try:
        yield run
    finally:
        ended.set()
        thread.join()
        _end(registry, run.id, holder)


def process_name() -> str:
    """Returns the name of this process: of its machine and its number, as `is_dead` reads it."""
    return f"{socket.gethostname()} process {os.getpid()} ({_machine()})"


def is_dead(holder: str) -> bool:
    """Whether a process ran on this machine and has ended. False if it ran on another one."""
    words = holder.split()
    if len(words) != 4 or words[3] != f"({_machine()})" or not words[2].isdecimal() or not _machine():
        return False
    return not Path("/proc", words[2]).exists()


def _machine() -> str:
    """What two processes share if each can see whether the other one lives: the boot and the PID namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot[:8]}-{Path('/proc/self/ns/pid').readlink().name.strip('pid:[]')}"
    except OSError:  # not Linux: a dead process is taken over when its lease has ended
        return ""


def _extend(registry: Registry, run: str, holder: str, ended: threading.Event) -> None:
    while not ended.wait(HEARTBEAT_SECONDS):
        try:
            with registry.writing() as session:
                nightly_schedule.extend_lease(session, run, holder, now=time.time(), seconds=LEASE_SECONDS)
        except LeaseLost as error:
            log.warning("%s", error.message)  # the next step fails with the same error
            return
        except LoramillError as error:
            log.warning("the lease of the nightly run %s could not be extended; retrying: %s", run, error.message)


def _end(registry: Registry, run: str, holder: str) -> None:
    try:
        with registry.writing() as session:
            nightly_schedule.end_lease(session, run, holder)
    except LoramillError as error:
        log.warning("the lease of the nightly run %s was not ended; it ends by itself: %s", run, error.message)
