"""The threads that fetch, read, pack and copy adapters while the engine steps."""

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
from loramill.kernels.device import is_out_of_memory
from loramill.kernels.memory import Recycler
from loramill.kernels.peft_folder import BaseModules, read_adapter
from loramill.serve.engine.adapters.host_cache import HostCache
from loramill.serve.engine.types import AdapterSource

log = logging.getLogger(__name__)


#: Adapters that may be packed before the engine has collected them; more would exceed its memory limits.
_MAX_UNCOLLECTED = 2
#: Bytes for reading and packing that are kept for reuse.
_RECYCLED_BYTES = 24 << 20
#: Bytes of the slab that get their pages before they are needed.
_PREPARED_BYTES = 32 << 20
#: With this niceness, an engine thread that competes for the same core gets three quarters of it.
_NICENESS = 5


@dataclass(frozen=True, slots=True)
class FetchedAdapter:
    """A packed adapter that needs memory in the slab.

    Attributes:
        cached: Whether its bytes belong to the host cache; otherwise they are recycled memory.
    """

    adapter: PackedAdapter
    cached: bool


@dataclass(frozen=True, slots=True)
class LoadResult:
    """The result of a version's fetch (a packed adapter) or copy (a filled slot), or the error of either."""

    version: str
    result: FetchedAdapter | Slot | LoramillError


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
        """
        Args:
            slab: Adapters are packed for it and copied into it.
            cache: Keeps packed adapters.
            base: What adapters may target.
            source: Where versions are.
            threads: Number of versions that are fetched at once.
            notify: Called after each result, by the thread that produced it.
        """
        self._slab = slab
        self._cache = cache
        self._base = base
        self._source = source
        self._notify = notify
        self._recycler = Recycler(_RECYCLED_BYTES)
        self._uncollected = threading.Semaphore(_MAX_UNCOLLECTED)
        self._closed = False
        self._results: queue.SimpleQueue[LoadResult] = queue.SimpleQueue()
        # A stage waits for the one before it alone, and work that nothing waits for comes last. Few threads pack, since
        # each keeps the most memory that it has ever used.
        self._sources = ThreadPoolExecutor(threads, thread_name_prefix="adapter-source", initializer=_lower_priority)
        self._packers = ThreadPoolExecutor(
            _MAX_UNCOLLECTED, thread_name_prefix="adapter-packer", initializer=_lower_priority
        )
        self._copier = ThreadPoolExecutor(1, thread_name_prefix="adapter-copier", initializer=_lower_priority)
        self._releaser = ThreadPoolExecutor(1, thread_name_prefix="adapter-releaser", initializer=_lower_priority)
        self._cache_prepared = self._releaser.submit(self._cache.prepare)
        self._releaser.submit(self._slab.prepare, _PREPARED_BYTES)

    def wait_until_prepared(self) -> None:
        """Waits until the host cache's memory is ready."""
        self._cache_prepared.result()

    def fetch(self, version: str) -> None:
        """Takes a version from the host cache, or starts to read it."""
        cached = self._cache.acquire(version)
        if cached is None:
            self._sources.submit(self._report, version, self._locate)
        else:
            self._results.put(LoadResult(version, FetchedAdapter(cached, cached=True)))
            self._notify()

    def copy(self, version: str, fetched: FetchedAdapter, slot: Slot) -> None:
        """Starts to copy an adapter into a slot that was allocated for it."""

        def into_slot(version: str) -> Slot:
            try:
                self._slab.load(slot, fetched.adapter)
            finally:
                self.release(version, fetched)
            return slot

        self._copier.submit(self._report, version, into_slot)

    def release(self, version: str, fetched: FetchedAdapter) -> None:
        """Ends the use of a fetched adapter; it remains in the host cache if there is room."""
        self._releaser.submit(self._release, version, fetched)

    def take_finished(self) -> list[LoadResult]:
        """Takes the results that are ready."""
        finished = [self._results.get() for _ in range(self._results.qsize())]
        for loaded in finished:
            # Not only once it is copied: an adapter that waits long for memory must not keep others from being read.
            if isinstance(loaded.result, FetchedAdapter) and not loaded.result.cached:
                self._uncollected.release()
        return finished

    def close(self, *, wait: bool) -> None:
        """Drops the work that has not begun; with `wait`, returns once the rest has ended."""
        self._closed = True
        for threads in (self._sources, self._packers, self._copier, self._releaser):
            threads.shutdown(wait=wait, cancel_futures=True)

    def _report(self, version: str, work: Callable[[str], FetchedAdapter | Slot | None]) -> None:
        """Runs a stage and queues its result, if it has one, or its error."""
        result: FetchedAdapter | Slot | LoramillError | None
        try:
            result = work(version)
        except LoramillError as error:
            log.warning("adapter not loaded", extra={"version": version, "error": error.message})
            result = error
        except Exception as error:
            # Closing without a wait ends the threads that the next stage would need; its results go to no one.
            if self._closed:
                return
            # The source is the caller's and the files are a tenant's: whatever they raise must end as an output.
            log.exception("adapter not loaded", extra={"version": version})
            result = AdapterInvalid(f"Version {version} can't be loaded: {error!r}.")
            if is_out_of_memory(error):
                result = Unavailable(f"The GPU had no memory to load version {version}: try again later.")
        if result is not None:
            self._results.put(LoadResult(version, result))
            self._notify()

    def _release(self, version: str, fetched: FetchedAdapter) -> None:
        if fetched.cached:
            self._cache.release(version)
        else:
            try:
                self._cache.put(version, fetched.adapter)
            finally:
                self._recycler.release(fetched.adapter.data)
        self._slab.prepare(_PREPARED_BYTES)

    def _locate(self, version: str) -> None:
        folder = self._source(version)
        self._packers.submit(self._report, version, partial(self._read, folder))

    def _read(self, folder: Path, version: str) -> FetchedAdapter:
        while not self._uncollected.acquire(timeout=0.1):
            if self._closed:
                raise Unavailable("The engine is closed.")
        try:
            with self._recycler.lending() as allocate:
                adapter = self._slab.pack(read_adapter(folder, self._base, allocate), self._recycler.allocate)
            if adapter.bytes > self._slab.size:
                raise AdapterInvalid(
                    f"Version {version} takes {adapter.bytes} bytes; all adapters together may take {self._slab.size}: "
                    "raise serve.adapter_bytes."
                )
        except BaseException:
            self._uncollected.release()
            raise
        return FetchedAdapter(adapter, cached=False)


def _lower_priority() -> None:
    # Only Linux has a niceness per thread.
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
