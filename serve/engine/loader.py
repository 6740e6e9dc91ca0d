"""The side threads that fetch, read and pack adapters while the engine steps."""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from loramill.errors import AdapterInvalid, LoramillError
from loramill.kernels import PackedAdapter, Slab
from loramill.serve.engine.peft_folder import read_adapter
from loramill.serve.engine.values import AdapterSource

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Loaded:
    """How a fetch ended: with an adapter, or with the error that its requests get."""

    version: str
    result: PackedAdapter | LoramillError


class AdapterLoader:
    """Loads versions in a few threads, so that one slow source holds up no other; results queue up for the engine."""

    def __init__(
        self,
        slab: Slab,
        target_weight: Callable[[str], torch.Tensor | None],
        source: AdapterSource,
        threads: int,
        notify: Callable[[], None],
    ) -> None:
        self._slab = slab
        self._target_weight = target_weight
        self._source = source
        self._notify = notify
        self._done: queue.SimpleQueue[Loaded] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="adapter-loader")

    def start(self, version: str) -> None:
        """Begins to load a version."""
        self._threads.submit(self._run, version)

    def finished(self) -> list[Loaded]:
        """Takes the results that are there."""
        return [self._done.get() for _ in range(self._done.qsize())]

    def close(self, *, wait: bool) -> None:
        """Drops the fetches that have not begun; the others go on to their end, which may be waited for."""
        self._threads.shutdown(wait=wait, cancel_futures=True)

    def _run(self, version: str) -> None:
        try:
            adapter = self._slab.pack(read_adapter(self._source(version), self._target_weight))
            if adapter.bytes > self._slab.size:
                raise AdapterInvalid(
                    f"Version {version} takes {adapter.bytes} bytes, all adapters together have {self._slab.size}; "
                    "raise serve.adapter_bytes."
                )
            result = Loaded(version, adapter)
        except LoramillError as error:
            log.warning("adapter not loaded", extra={"version": version, "error": error.message})
            result = Loaded(version, error)
        except Exception as error:
            # The source is the caller's and the files are a tenant's: whatever they do must end as an answer.
            log.exception("adapter not loaded", extra={"version": version})
            result = Loaded(version, AdapterInvalid(f"Version {version} can't be loaded: {error!r}."))
        self._done.put(result)
        self._notify()
