"""What is measured and who asks it, each part started when it is first wanted."""

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
from loramill_bench.http.alone import Alone
from loramill_bench.http.answers import Run
from loramill_bench.http.bare import Bare
from loramill_bench.http.client import Server
from loramill_bench.http.published import Published, publish
from loramill_bench.http.work import DISTINCT, Desk, Stream


class Site:
    """loramill, vLLM and the bare engine over one base and the same adapters; use it by `with`.

    Args:
        base: that is served, in bfloat16.
        settings: of loramill; its record, its port and its device are the site's own, and its engine has a thread on
            every core unless they say otherwise.
        folder: for the record and the logs.
        vllm: a Python that vLLM is installed for; None: there is none to compare with.
        seed: of adapters and requests.

    Attributes:
        cores: of this machine.
        serve: the settings of loramill's server.
    """

    def __init__(self, base: Base, settings: Settings, folder: Path, vllm: Path | None, seed: int) -> None:
        self.cores = os.cpu_count() or 1
        self.serve = _served(settings.serve, self.cores)
        self.vllm = vllm and vllm.absolute()
        own = {"home": folder, "database_url": None, "artifacts_url": None, "base": base.name, "serve": self.serve}
        self._settings = settings.model_copy(update=own)
        self._base, self._folder, self._seed = base, folder, seed
        self._running = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._running.close()

    @cached_property
    def published(self) -> Published:
        """The adapters."""
        return publish(self._settings, self._base, self._seed)

    @cached_property
    def desk(self) -> Desk:
        """Where requests are drawn."""
        tokenizer = ChatTokenizer.load(self._base.folder)
        return Desk(self._base.name, tuple(self.published.folders), tokenizer, self._seed)

    @cached_property
    def loramill(self) -> Server:
        """loramill's server.

        Raises:
            SetupError: it doesn't come up.
        """
        assert self.published  # the record is there before the server is
        return self._running.enter_context(servers.loramill(self._settings))

    @cached_property
    def vllm_base(self) -> Server:
        """vLLM's server, which knows of no adapters.

        Raises:
            SetupError: it doesn't come up.
        """
        return self._vllm("vllm-base", adapters=False)

    @cached_property
    def vllm_adapters(self) -> Server:
        """vLLM's server with as many slots for adapters as are in use at once.

        Raises:
            SetupError: it doesn't come up.
        """
        return self._vllm("vllm-adapters", adapters=True)

    def ask(self, server: Server, streams: Sequence[Stream]) -> Run:
        """What comes of asking a server over HTTP, from a process of its own."""
        return self.begin(server, streams).result()

    def begin(self, server: Server, streams: Sequence[Stream]) -> Future[Run]:
        """Begins to ask."""
        return self._client.begin(client.run, server, streams)

    def bare(self, what: Callable[[Bare, Sequence[Stream]], Run], streams: Sequence[Stream]) -> Run:
        """What comes of asking without a server, in a process with the settings and the environment of a replica."""
        return self._replica.call(what, Bare(self._base, tuple(self.published.folders.items()), self.serve), streams)

    @cached_property
    def _client(self) -> Alone:
        return self._running.enter_context(Alone())

    @cached_property
    def _replica(self) -> Alone:
        from loramill.serve.deployments import one_thread_env  # Ray, which who asks does without

        return self._running.enter_context(Alone(one_thread_env(self.serve.threads)))

    def _vllm(self, name: str, adapters: bool) -> Server:
        if self.vllm is None:
            raise SetupError("There is no vLLM to compare with: name a Python that has it with --vllm.")
        folders = self.published.folders if adapters else {}
        return self._running.enter_context(
            servers.vllm(self.vllm, self._base, folders, slots=DISTINCT, log=self._folder / f"{name}.log")
        )


def _served(settings: ServeSettings, cores: int) -> ServeSettings:
    threads = settings.threads if "threads" in settings.model_fields_set else cores
    return settings.model_copy(
        update={"port": servers.free_port(), "host": "127.0.0.1", "device": "cpu", "threads": threads}
    )
