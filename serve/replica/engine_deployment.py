"""An engine replica as a Ray Serve deployment."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

from ray import serve

from loramill import logs
from loramill.errors import LoramillError
from loramill.models.catalog import find_base
from loramill.registry import Registry
from loramill.serve.protocol import TextChunk, TextRequest
from loramill.serve.transport.channel import Address, Sender
from loramill.settings import Settings

#: Seconds between looks at the engine for the metrics.
_METRICS_INTERVAL_SECONDS = 0.5


class EngineDeployment:
    """One engine, the answers of which go to the gateways that asked, and what it says of itself."""

    _metrics_task: asyncio.Task[None] | None = None

    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]  # Serve awaits it
        # torch, which the gateway and the driver can do without
        from loramill.serve.metrics.engine import EngineMetrics
        from loramill.serve.replica.replica import Replica
        from loramill.serve.routing.load import LoadWindow

        logs.configure()
        registry = Registry.open(settings.database, settings.artifacts)
        base = find_base(settings.base, settings.cache, settings.quantization)
        self._replica = Replica(base, registry.artifacts.fetch, settings.serve)
        self._sender = Sender()
        self._load = LoadWindow()
        self._metrics = EngineMetrics(serve.get_replica_context().replica_id.unique_id)
        self._metrics_task = asyncio.create_task(self._update_metrics())
        # What is here now stays; to look through it for garbage would stop all answers for 0.2 s, again and again.
        gc.collect()
        gc.freeze()

    async def answer(self, request: TextRequest, to: Address) -> LoramillError | None:
        """Generates one answer, of which each chunk goes to the gateway at once.

        Returns:
            When all chunks have gone, None; or why there is no more. It isn't raised: Serve would write each refusal
            of a flood into its log, with a traceback.
        """
        try:
            await self._answer(request, await self._sender.connect(to))
        except LoramillError as error:
            return error
        return None

    async def _answer(self, request: TextRequest, send: Callable[[str, TextChunk | None], None]) -> None:
        asked, begun = time.monotonic(), False
        send(request.id, None)
        async with aclosing(self._replica.generate(request)) as chunks:
            async for chunk in chunks:
                send(request.id, chunk)
                if not begun:
                    begun, now = True, time.monotonic()
                    self._load.record_first_token(now, now - asked)

    async def check_health(self) -> None:
        """Tells Serve to replace a replica whose engine has stopped or hangs."""
        await self._replica.ready()

    def record_routing_stats(self) -> dict[str, Any]:
        """What Serve tells the gateways' routers."""
        return self._load.routing_stats(self._replica.stats())

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What Serve tells the autoscaling policy."""
        return self._load.autoscaling_stats(time.monotonic(), self._replica.stats())

    async def _update_metrics(self) -> None:
        while True:
            self._metrics.update(self._replica.stats())
            await asyncio.sleep(_METRICS_INTERVAL_SECONDS)

    async def __del__(self) -> None:
        """Serve calls this when all answers are finished, and after a constructor that failed."""
        if self._metrics_task is None:
            return
        self._metrics_task.cancel()
        self._metrics.update(self._replica.stats())
        await self._sender.close()
        self._replica.close()
