"""What must be in place before a cluster starts: folders, a free port, stores, an admin key."""

from __future__ import annotations

import contextlib
import shutil
import socket
import tempfile
from collections.abc import Sequence
from pathlib import Path

from loramill.errors import DiskFull, PortTaken, SetupError, Unauthenticated
from loramill.models.catalog import Base, find_base
from loramill.plural import counted
from loramill.registry import Registry, api_keys
from loramill.registry.jobs import queue
from loramill.settings import Settings
from loramill.storage.atomic import replace_text
from loramill.storage.object_store import check_store

#: Free bytes that the home folder needs.
FREE_BYTES = 1 << 30


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


def check_stores(settings: Settings) -> None:
    """Writes, reads and deletes a small object in each of the three stores.

    Raises:
        SetupError: The URL of a store can't be opened. StoreUnusable: A store can't be used.
    """
    for url in (settings.artifacts, settings.checkpoints, settings.sessions):
        check_store(url)


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
