"""Adapters that were read and packed, kept in the host's memory: between the disk and the slots."""

from __future__ import annotations

import threading
from collections import OrderedDict

from loramill.kernels import PackedAdapter
from loramill.kernels.memory import host_memory


class HostCache:
    """Packed adapters by version, in at most `size` bytes; the one used longest ago leaves first.

    Any thread may `get`, one at a time may `put`.

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
        """Keeps a copy of an adapter, in place of others if need be; one larger than the whole cache isn't kept.

        A copy: the next one is packed sooner into memory that this one has just used than into memory that is new.
        """
        if adapter.bytes > self._size or self.get(version) is not None:
            return
        with self._lock:
            while self.bytes + adapter.bytes > self._size:
                _, gone = self._adapters.popitem(last=False)
                self.bytes -= gone.bytes
        data = host_memory(adapter.bytes)
        data.copy_(adapter.data)
        with self._lock:
            self._adapters[version] = PackedAdapter(data, adapter.table)
            self.bytes += adapter.bytes
