"""Adapters that were read and packed, kept in the host's memory: between the disk and the slots."""

from __future__ import annotations

import threading
from collections import OrderedDict

from loramill.kernels import PackedAdapter


class HostCache:
    """Packed adapters by version, in at most `size` bytes; the one used longest ago leaves first. Any thread may call.

    Attributes:
        bytes: that they take.
    """

    def __init__(self, size: int) -> None:
        self.bytes = 0
        self._size = size
        self._adapters: OrderedDict[str, PackedAdapter] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, version: str) -> PackedAdapter | None:
        """A version's adapter, if it is here."""
        with self._lock:
            if version in self._adapters:
                self._adapters.move_to_end(version)
            return self._adapters.get(version)

    def put(self, version: str, adapter: PackedAdapter) -> None:
        """Keeps an adapter, in place of others if need be; one larger than the whole cache isn't kept."""
        with self._lock:
            if version in self._adapters or adapter.bytes > self._size:
                return
            self._adapters[version] = adapter
            self.bytes += adapter.bytes
            while self.bytes > self._size:
                _, gone = self._adapters.popitem(last=False)
                self.bytes -= gone.bytes
