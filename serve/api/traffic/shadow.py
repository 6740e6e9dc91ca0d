"""Copies of requests that a challenger answers in the background, for its signals alone."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import replace
from types import TracebackType
from typing import Self

from loramill.errors import LoramillError
from loramill.serve.api.traffic.observation import CallObservation
from loramill.serve.api.traffic.tracker import TrafficTracker
from loramill.serve.protocol import GenerationBackend, TextRequest
from loramill.serve.routing.canary import in_share
from loramill.types import RolloutRecord

log = logging.getLogger("loramill.gateway")

#: Copies that one gateway runs at once; what comes meanwhile is not copied.
MAX_RUNNING = 8
#: Seconds after which a copy is given up, uncounted: at low priority it may wait for as long as there is load.
TIMEOUT_SECONDS = 120.0
#: Lower than that of every request of a user.
PRIORITY = -1
#: In place of the tenant, so that copies take nothing from the tenant's fair share.
SHADOW_TENANT = "(shadow)"


class ShadowRunner:
    """Runs copies of requests until the block ends. Their texts are dropped, and no usage is counted."""

    def __init__(self, tracker: TrafficTracker) -> None:
        self._tracker = tracker
        self._running: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    def copy(self, rollout: RolloutRecord | None, backend: GenerationBackend, requests: Sequence[TextRequest]) -> None:
        """Starts a copy of a call if it is in the rollout's share and there is room.

        Args:
            rollout: a rollout whose version answers copies; None: nothing is copied.
            backend: the backend of the requests.
            requests: the requests of the call, one per answer. Only the first one is copied.
        """
        if rollout is None or len(self._running) >= MAX_RUNNING or not in_share(rollout, requests[0].id):
            return
        copied = replace(
            requests[0],
            id=f"{requests[0].id}-shadow",
            tenant=SHADOW_TENANT,
            version=rollout.version,
            priority=PRIORITY,
        )
        task = asyncio.create_task(self._run(rollout, backend, copied))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _run(self, rollout: RolloutRecord, backend: GenerationBackend, request: TextRequest) -> None:
        try:
            async with asyncio.timeout(TIMEOUT_SECONDS):
                with CallObservation(self._tracker.add_copy, (rollout.adapter, rollout.version), 1) as observation:
                    async with aclosing(backend.generate(request)) as chunks:
                        async for chunk in chunks:
                            observation.record_chunk(0, chunk)
        except TimeoutError:
            log.info("a copy of a request for %s took too long", rollout.adapter)
        except LoramillError as error:
            log.info("a copy of a request for %s failed: %s", rollout.adapter, error.code)
        except Exception:  # a bug that only the copy meets must be seen in the log, and nowhere else
            log.exception("a copy of a request for %s failed", rollout.adapter)
