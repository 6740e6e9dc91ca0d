"""The measured servers, the client and the workload; each part starts when it is first used."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Self

from loramill.data.tokenizer import ChatTokenizer
from loramill.errors import SetupError
from loramill.models.catalog import Base
from loramill.settings import ServeSettings, Settings
from loramill_bench.http import client, servers
from loramill_bench.http.answers import Run
from loramill_bench.http.client import Server
from loramill_bench.http.direct import DirectTarget
from loramill_bench.http.publish import PublishedAdapters, publish
from loramill_bench.http.worker_process import WorkerProcess
from loramill_bench.http.workload import DISTINCT, Stream, Workload


class Testbed:
    """loramill, vLLM and the engine called directly, over one base and the same adapters; a context manager.

    Args:
        base: The served base, in bfloat16.
        settings: Settings of loramill. Registry, port and device are replaced; the engine has one thread per core
            unless `serve.threads` is set.
        folder: Folder for the registry and the logs.
        vllm: Python interpreter of an environment with vLLM; None: vLLM is not measured.
        seed: Seed of adapters and requests.

    Attributes:
        cores: Number of this machine's cores.
        serve: The settings of loramill's server.
    """

    def __init__(self, base: Base, settings: Settings, folder: Path, vllm: Path | None, seed: int) -> None:
        self.cores = os.cpu_count() or 1
        self.serve = _server_settings(settings.serve, self.cores)
        self.vllm = vllm and vllm.absolute()
        own = {"home": folder, "database_url": None, "artifacts_url": None, "base": base.name, "serve": self.serve}
        self._settings = settings.model_copy(update=own)
        self._base, self._folder, self._seed = base, folder, seed
        self._resources = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._resources.close()

    @cached_property
    def published(self) -> PublishedAdapters:
        """The published adapters."""
        return publish(self._settings, self._base, self._seed)

    @cached_property
    def workload(self) -> Workload:
        """The generator of requests."""
        tokenizer = ChatTokenizer.load(self._base.folder)
        return Workload(self._base.name, tuple(self.published.folders), tokenizer, self._seed)

    @cached_property
    def loramill(self) -> Server:
        """loramill's server.

        Raises:
            SetupError: The server does not start.
        """
        assert self.published  # the registry must exist before the server starts
        return self._resources.enter_context(servers.loramill(self._settings))

    @cached_property
    def vllm_base(self) -> Server:
        """vLLM's server with LoRA disabled.

        Raises:
            SetupError: The server does not start.
        """
        return self._vllm("vllm-base", adapters=False)

    @cached_property
    def vllm_adapters(self) -> Server:
        """vLLM's server with `DISTINCT` adapter slots.

        Raises:
            SetupError: The server does not start.
        """
        return self._vllm("vllm-adapters", adapters=True)

    def run_streams(self, server: Server, streams: Sequence[Stream]) -> Run:
        """Sends streams to a server over HTTP, from the client process; returns when all have ended."""
        return self.start_streams(server, streams).result()

    def start_streams(self, server: Server, streams: Sequence[Stream]) -> Future[Run]:
        """Starts to send streams to a server over HTTP, from the client process."""
        return self._client.submit(client.run, server, streams)

    def run_direct(self, run: Callable[[DirectTarget, Sequence[Stream]], Run], streams: Sequence[Stream]) -> Run:
        """Runs streams without a server, in a process with the settings and the environment of a replica."""
        return self._replica.call(
            run, DirectTarget(self._base, tuple(self.published.folders.items()), self.serve), streams
        )

    @cached_property
    def _client(self) -> WorkerProcess:
        return self._resources.enter_context(WorkerProcess())

    @cached_property
    def _replica(self) -> WorkerProcess:
        from loramill.serve.deployments import one_thread_env  # imports Ray, which the client process does not need

        return self._resources.enter_context(WorkerProcess(one_thread_env(self.serve.threads)))

    def _vllm(self, name: str, adapters: bool) -> Server:
        if self.vllm is None:
            raise SetupError(
                "vLLM is not available: give the Python interpreter of an environment with vLLM by --vllm."
            )
        folders = self.published.folders if adapters else {}
        return self._resources.enter_context(
            servers.vllm(self.vllm, self._base, folders, slots=DISTINCT, log=self._folder / f"{name}.log")
        )


def _server_settings(settings: ServeSettings, cores: int) -> ServeSettings:
    threads = settings.threads if "threads" in settings.model_fields_set else cores
    return settings.model_copy(
        update={"port": servers.free_port(), "host": "127.0.0.1", "device": "cpu", "threads": threads}
    )
