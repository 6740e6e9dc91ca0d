"""The side threads that fetch, read, pack and copy adapters while the engine steps."""

from __future__ import annotations

import logging
import os
import queue
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from loramill.errors import AdapterInvalid, LoramillError, Unavailable
from loramill.kernels import PackedAdapter, Slab, Slot
from loramill.kernels.memory import Recycler
from loramill.kernels.peft_folder import BaseModules, read_adapter
from loramill.serve.engine.adapters.host_cache import HostCache
from loramill.serve.engine.types import AdapterSource

log = logging.getLogger(__name__)


#: Adapters that are packed before the engine has seen them: more would take more memory than its bounds say.
_PACKS = 2
#: Bytes for reading and packing that are kept for the next ones.
_SPARE = 24 << 20
#: Bytes of the slab that have pages before they are wanted.
_AHEAD = 32 << 20
#: Where the engine's thread wants the same core, it gets three quarters of it.
_NICE = 5


@dataclass(frozen=True, slots=True)
class Fetched:
    """An adapter to find room for; `borrowed` from the host cache, or in memory that the next one gets."""

    adapter: PackedAdapter
    borrowed: bool


@dataclass(frozen=True, slots=True)
class LoadResult:
    """How a version's fetch or copy ended: an adapter to find room for, a slot that is filled, or an error."""

    version: str
    result: Fetched | Slot | LoramillError


class AdapterLoader:
    """Loads versions in a few threads, so that one slow source holds up no other; results queue up for the engine."""

    def __init__(
        self,
        slab: Slab,
        cache: HostCache,
        base: BaseModules,
        source: AdapterSource,
        threads: int,
        notify: Callable[[], None],
    ) -> None:
        self._slab = slab
        self._cache = cache
        self._base = base
        self._source = source
        self._notify = notify
        self._room = Recycler(_SPARE)
        self._packs = threading.Semaphore(_PACKS)
        self._closed = False
        self._done: queue.SimpleQueue[LoadResult] = queue.SimpleQueue()
        # A stage waits for nothing but the one before it, and what nobody waits for comes last. Few threads pack, as
        # each keeps what memory it ever took.
        self._sources = ThreadPoolExecutor(threads, thread_name_prefix="adapter-source", initializer=_step_back)
        self._packers = ThreadPoolExecutor(_PACKS, thread_name_prefix="adapter-packer", initializer=_step_back)
        self._copier = ThreadPoolExecutor(1, thread_name_prefix="adapter-copier", initializer=_step_back)
        self._releaser = ThreadPoolExecutor(1, thread_name_prefix="adapter-keeper", initializer=_step_back)
        self._releaser.submit(self._slab.prepare, _AHEAD)

    def fetch(self, version: str) -> None:
        """Takes a version from the host cache, or begins to read it."""
        known = self._cache.acquire(version)
        if known is None:
            self._sources.submit(self._finish, version, self._locate)
        else:
            self._done.put(LoadResult(version, Fetched(known, borrowed=True)))
            self._notify()

    def copy(self, version: str, fetched: Fetched, slot: Slot) -> None:
        """Begins to copy an adapter into a slot that was allocated for it."""

        def into_slot(version: str) -> Slot:
            try:
                self._slab.load(slot, fetched.adapter)
            finally:
                self.release(version, fetched)
            return slot

        self._copier.submit(self._finish, version, into_slot)

    def release(self, version: str, fetched: Fetched) -> None:
        """Ends the use of what was fetched; it stays in the host cache if that has room."""
        self._releaser.submit(self._keep, version, fetched)

    def take_finished(self) -> list[LoadResult]:
        """Takes the results that are there."""
        finished = [self._done.get() for _ in range(self._done.qsize())]
        for loaded in finished:
            # Not once it is copied: one that waits long for room must not keep others from being read.
            if isinstance(loaded.result, Fetched) and not loaded.result.borrowed:
                self._packs.release()
        return finished

    def close(self, *, wait: bool) -> None:
        """Drops what has not begun; the rest goes on to its end, which may be waited for."""
        self._closed = True
        for threads in (self._sources, self._packers, self._copier, self._releaser):
            threads.shutdown(wait=wait, cancel_futures=True)

    def _finish(self, version: str, work: Callable[[str], Fetched | Slot | None]) -> None:
        result: Fetched | Slot | LoramillError | None
        try:
            result = work(version)
        except LoramillError as error:
            log.warning("adapter not loaded", extra={"version": version, "error": error.message})
            result = error
        except Exception as error:
            # The source is the caller's and the files are a tenant's: whatever they do must end as an answer.
            log.exception("adapter not loaded", extra={"version": version})
            result = AdapterInvalid(f"Version {version} can't be loaded: {error!r}.")
        if result is not None:
            self._done.put(LoadResult(version, result))
            self._notify()

    def _keep(self, version: str, fetched: Fetched) -> None:
        if fetched.borrowed:
            self._cache.release(version)
        else:
            try:
                self._cache.put(version, fetched.adapter)
            finally:
                self._room.release(fetched.adapter.data)
        self._slab.prepare(_AHEAD)

    def _locate(self, version: str) -> None:
        folder = self._source(version)
        self._packers.submit(self._finish, version, partial(self._read, folder))

    def _read(self, folder: Path, version: str) -> Fetched:
        while not self._packs.acquire(timeout=0.1):
            if self._closed:
                raise Unavailable("The engine is closed.")
        try:
            with self._room.lending() as lend:
                adapter = self._slab.pack(read_adapter(folder, self._base, lend), self._room.allocate)
            if adapter.bytes > self._slab.size:
                raise AdapterInvalid(
                    f"Version {version} takes {adapter.bytes} bytes, all adapters together have {self._slab.size}; "
                    "raise serve.adapter_bytes."
                )
        except BaseException:
            self._packs.release()
            raise
        return Fetched(adapter, borrowed=False)


def _step_back() -> None:
    # Only Linux has a niceness for each thread.
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
