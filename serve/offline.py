"""Batch generation on this machine without a gateway, by an engine replica in this process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import aclosing
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any

from pydantic import Field, ValidationError, model_validator

from loramill.data.conversation import LINE_KEYS, LineError, read_prompt
from loramill.data.filetype import describe_kind, detect_kind
from loramill.data.jsonl import decode, iter_rows, parse
from loramill.data.messages import Message
from loramill.data.problems import ProblemList
from loramill.errors import DatasetInvalid, LoramillError
from loramill.models.catalog import Base
from loramill.serve.engine import AdapterSource, EngineConfig
from loramill.serve.protocol import SampledToken, TextRequest
from loramill.serve.replica.replica import Replica
from loramill.settings import ServeSettings
from loramill.types import FrozenModel

#: Prompts in flight: more than the engine runs, and half of its maximum of waiting requests, because requests that a
#: stop string ended count as waiting until the engine's next step.
_MAX_IN_FLIGHT = EngineConfig().max_waiting // 2

#: Number of bytes by which a file's type is detected.
_MAGIC_BYTES = 16

#: Seconds without an answer after which the engine is checked.
_POLL_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class OfflineCompletion:
    """The answer to one prompt.

    Attributes:
        request: the prompt's request, as it was passed.
        text: the answer, up to the error if there was one.
        finish: "stop" or "length"; None if there was an error.
        error: why the answer is missing or incomplete.
        logprobs: the answer's tokens, if the request has `logprobs`.
    """

    request: TextRequest
    text: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish: str | None = None
    error: LoramillError | None = None
    logprobs: tuple[SampledToken, ...] = ()


class OfflineEngine:
    """Answers prompts with the base and any adapter, all mixed in the same batches. Close it, or use it with `with`.

        with OfflineEngine(base, registry.artifacts.fetch, settings.serve) as engine:
            params = SamplingParams(max_tokens=64)
            prompts = (TextRequest("", "acme", prompt=text, sampling_params=params) for text in texts)
            for completion in engine.generate(prompts, ordered=True):
                ...

    Args:
        base: the base model; it is loaded into this process.
        source: returns the PEFT folder of a request's `version`; called in other threads.
        settings: limits and threads of the engine.
        cache: folder for weights in NF4 (`Settings.cache`); None: they are quantized each time.

    Raises:
        BaseUnusable: the base cannot be loaded.
    """

    def __init__(
        self, base: Base, source: AdapterSource, settings: ServeSettings, *, cache: Path | None = None
    ) -> None:
        self._numbers = count(1)
        settings = settings.model_copy(update={"max_waiting": 2 * _MAX_IN_FLIGHT})
        self._replica = Replica(base, source, settings, cache=cache)
        self._loop = asyncio.new_event_loop()
        self._closing = asyncio.Event()
        # An event loop of its own: callers need none, and text is decoded while the engine computes.
        self._thread = threading.Thread(target=self._run, name="offline", daemon=True)
        self._thread.start()

    def __enter__(self) -> OfflineEngine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Stops the threads; answers in flight are dropped."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._closing.set)
            self._thread.join()
            self._replica.close()

    def generate(self, prompts: Iterable[TextRequest], *, ordered: bool = False) -> Iterator[OfflineCompletion]:
        """Yields one completion per prompt, when it is complete or in the order of the prompts.

        The error of a prompt is in its completion. A few hundred prompts are read ahead. Closing the iterator drops
        answers in flight.

        Args:
            prompts: any number of requests; their ids may repeat.
            ordered: whether completions have the order of the prompts.

        Raises:
            Unavailable: the engine has stopped.
            Exception: raised by iterating over `prompts`.
        """
        rest = enumerate(prompts)
        done: SimpleQueue[Future[OfflineCompletion]] = SimpleQueue()
        live: dict[Future[OfflineCompletion], int] = {}
        early: dict[int, OfflineCompletion] = {}
        due = 0
        try:
            while True:
                for position, prompt in islice(rest, _MAX_IN_FLIGHT - len(live) - len(early)):
                    future = asyncio.run_coroutine_threadsafe(self._answer(prompt), self._loop)
                    live[future] = position
                    future.add_done_callback(done.put)
                if not live:
                    return
                future = self._wait(done)
                position = live.pop(future)
                if not ordered:
                    yield future.result()
                    continue
                early[position] = future.result()
                while due in early:
                    due += 1
                    yield early.pop(due - 1)
        finally:
            for future in live:
                future.cancel()

    async def _answer(self, prompt: TextRequest) -> OfflineCompletion:
        text: list[str] = []
        logprobs: list[SampledToken] = []
        completion = OfflineCompletion(prompt)
        try:
            # An id of its own: those of the caller may repeat.
            async with aclosing(self._replica.generate(replace(prompt, id=f"offline-{next(self._numbers)}"))) as chunks:
                async for chunk in chunks:
                    text.append(chunk.text)
                    logprobs += chunk.logprobs
                    completion = OfflineCompletion(
                        prompt, "", chunk.prompt_tokens, chunk.completion_tokens, chunk.finish
                    )
        except LoramillError as error:
            completion = replace(completion, error=error)
        return replace(completion, text="".join(text), logprobs=tuple(logprobs))

    def _wait(self, done: SimpleQueue[Future[OfflineCompletion]]) -> Future[OfflineCompletion]:
        while True:
            try:
                return done.get(timeout=_POLL_SECONDS)
            except Empty:
                asyncio.run_coroutine_threadsafe(self._replica.ready(), self._loop).result()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._closing.wait())


class _PromptLine(FrozenModel):
    """A line of a JSONL file of prompts, or of a dataset, whose answers are ignored.

    The keys of a conversation are those of `read_prompt`.
    """

    prompt: str | None = None
    completion: str | None = None
    weight: float | None = None
    messages: list[Any] | None = None
    tools: list[Any] | None = None
    functions: list[Any] | None = None
    parallel_tool_calls: bool | None = None
    id: str | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0)
    seed: int | None = None
    stop: str | tuple[str, ...] | None = None

    @model_validator(mode="after")
    def _require_one_prompt(self) -> _PromptLine:
        if (self.prompt is None) == (not self.messages):
            raise ValueError('write either "prompt" or "messages", with a message to answer')
        if self.completion is not None and self.prompt is None:
            raise ValueError('"completion" belongs to "prompt"')
        return self

    def request(self, number: int, defaults: TextRequest, *, chat: bool) -> TextRequest:
        """The line as a request; `defaults` has what the line does not set."""
        names = ("max_tokens", "temperature", "top_p", "top_k", "seed")
        params = {name: value for name in names if (value := getattr(self, name)) is not None}
        fields: dict[str, Any] = {
            "id": self.id or str(number),
            "sampling_params": replace(defaults.sampling_params, **params),
        }
        if self.stop is not None:
            fields["stop"] = (self.stop,) if isinstance(self.stop, str) else self.stop
        if self.prompt is not None:
            return build_request(self.prompt, replace(defaults, **fields), chat=chat)
        messages, tools = read_prompt(self.model_dump(include=set(LINE_KEYS)))
        conversation = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        if not conversation:
            raise LineError('write either "prompt" or "messages", with a message to answer.')
        return replace(defaults, **fields, messages=conversation, tools=tools)


def build_request(text: str, defaults: TextRequest, *, chat: bool) -> TextRequest:
    """A request as `defaults`, to answer a text by the chat template, or to continue it if not `chat`."""
    if chat:
        return replace(defaults, messages=(Message(role="user", content=text),))
    return replace(defaults, prompt=text)


class PromptFile:
    """The prompts of a file. Each iteration reads the file again; the length is the number of prompts.

    `.txt`: one prompt per line. All other files are JSONL: lines of `{"prompt": …}` or `{"messages": […]}`, the latter
    with optional `tools`, and both with optional `id`, `max_tokens`, `temperature`, `top_p`, `top_k`, `seed` and
    `stop`. A dataset's lines work unchanged: their answers are ignored. Blank lines are skipped. A prompt without an id
    gets its line number.

    Args:
        path: the file.
        defaults: what a line does not set: version, tenant, sampling parameters.
        chat: whether texts are questions for the chat template, rather than texts to continue; None: those of a .txt
            are, those of JSONL are not.

    Raises:
        DatasetInvalid: `problems` lists what is wrong, with file, line, field and what to do.
        OSError: the file cannot be read.
    """

    def __init__(self, path: Path, defaults: TextRequest, *, chat: bool | None = None) -> None:
        self._path = path
        self._defaults = defaults
        self._plain = path.suffix == ".txt"
        self._chat = self._plain if chat is None else chat
        self._length = 0
        problems = ProblemList(path.name)
        for number, row in self._rows():
            self._length += 1
            try:
                self._read(number, row)
            except DatasetInvalid as error:
                problems.add(error.message, f"line {number}")
        if not self._length:
            raise DatasetInvalid(f"{path.name} has no prompts; write one on each line.")
        problems.raise_if_any()

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[TextRequest]:
        return (self._read(number, row) for number, row in self._rows())

    def _rows(self) -> Iterator[tuple[int, bytes]]:
        with self._path.open("rb") as file:
            if (kind := detect_kind(file.read(_MAGIC_BYTES))) is not None:
                raise DatasetInvalid(f"{self._path.name} is {describe_kind(kind)}; prompts are text or JSONL in UTF-8.")
            file.seek(0)
            yield from iter_rows(file)

    def _read(self, number: int, row: bytes) -> TextRequest:
        """The request of a line; error messages do not contain its position."""
        try:
            if self._plain:
                return build_request(
                    decode(row).strip("\r\n"), replace(self._defaults, id=str(number)), chat=self._chat
                )
            parse(row)  # stricter than pydantic, which accepts repeated keys and half surrogate pairs
            return _PromptLine.model_validate_json(row).request(number, self._defaults, chat=self._chat)
        except LineError as error:
            raise DatasetInvalid(str(error)) from error
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field = ".".join(map(str, first["loc"]))
            raise DatasetInvalid(f"{field + ': ' if field else ''}{first['msg']}.") from error
