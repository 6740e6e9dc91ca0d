"""An engine replica as a Ray Serve deployment."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

from ray import serve

from loramill import logs
from loramill.errors import LoramillError
from loramill.models.catalog import Base, find_base
from loramill.registry import Registry, adapters
from loramill.serve.protocol import TextChunk, TextRequest
from loramill.serve.transport.channel import Address, Sender
from loramill.settings import Settings

log = logging.getLogger(__name__)

#: Seconds between updates of the engine's metrics.
_METRICS_INTERVAL_SECONDS = 0.5


def _expected_ranks(registry: Registry, base: Base) -> tuple[int, ...]:
    """The ranks of the champions; none if the database does not answer, so that the replica starts without it."""
    try:
        with registry.reading() as session:
            return adapters.champion_ranks(session, base.fingerprint)
    except LoramillError as error:
        log.warning("graphs are captured for adapters of the default rank only: %s", error)
        return ()


class EngineDeployment:
    """One engine replica: sends answers to the calling gateways, and reports its load."""

    _metrics_task: asyncio.Task[None] | None = None

    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]  # Serve awaits it
        # These import torch, which the gateway and the driver do not need
        from loramill.serve.metrics.engine import EngineMetrics
        from loramill.serve.replica.replica import Replica, resolve_device
        from loramill.serve.routing.load import LoadWindow

        logs.configure()
        registry = Registry.open(settings.database, settings.artifacts)
        base = find_base(settings.base, settings.cache, settings.quantization)
        self._replica = Replica(
            base,
            registry.artifacts.fetch,
            settings.serve,
            cache=settings.cache,
            ranks=_expected_ranks(registry, base) if resolve_device(settings.serve) == "cuda" else (),
        )
        self._sender = Sender()
        self._load = LoadWindow(self._replica.expected_tokens_per_second)
        self._metrics = EngineMetrics(serve.get_replica_context().replica_id.unique_id)
        self._metrics_task = asyncio.create_task(self._update_metrics())
        # The objects so far stay: collecting garbage among them would stop all answers for 0.2 s each time.
        gc.collect()
        gc.freeze()

    async def answer(self, request: TextRequest, to: Address) -> LoramillError | None:
        """Generates one answer, and sends each chunk to the gateway at `to` at once.

        Returns:
            None after the last chunk, or the error that ended the answer. It is not raised: under overload, Serve would
            log each refusal with a traceback.
        """
        try:
            await self._answer(request, await self._sender.connect(to))
        except LoramillError as error:
            return error
        return None

    async def _answer(self, request: TextRequest, send: Callable[[str, TextChunk | None], None]) -> None:
        started, first = time.monotonic(), True
        send(request.id, None)
        async with aclosing(self._replica.generate(request)) as chunks:
            async for chunk in chunks:
                send(request.id, chunk)
                if first:
                    first, now = False, time.monotonic()
                    self._load.record_first_token(now, now - started)

    async def check_health(self) -> None:
        """Raises if the engine has stopped or hangs; Serve then replaces the replica."""
        await self._replica.ready()

    def record_routing_stats(self) -> dict[str, Any]:
        """The report that Serve passes to the gateways' routers."""
        return self._load.routing_stats(self._replica.stats())

    def record_autoscaling_stats(self) -> dict[str, float]:
        """The load that Serve passes to the autoscaling policy."""
        return self._load.autoscaling_stats(time.monotonic(), self._replica.stats())

    async def _update_metrics(self) -> None:
        while True:
            self._metrics.update(self._replica.stats())
            await asyncio.sleep(_METRICS_INTERVAL_SECONDS)

    async def __del__(self) -> None:
        """Called by Serve when all answers are complete, and after a constructor that failed."""
        if self._metrics_task is None:
            return
        self._metrics_task.cancel()
        self._metrics.update(self._replica.stats())
        await self._sender.close()
        self._replica.close()
