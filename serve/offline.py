"""Answers to many prompts on this machine, without a gateway: an engine replica of one's own, as busy as it can be."""

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
from loramill.data.examples import MAX_LISTED
from loramill.data.filetype import describe_kind, detect_kind
from loramill.data.jsonl import decode, iter_rows, parse
from loramill.data.tokenizer import Message
from loramill.errors import DatasetInvalid, LoramillError
from loramill.models.catalog import Base
from loramill.serve.engine import AdapterSource, EngineConfig
from loramill.serve.protocol import SampledToken, TextRequest
from loramill.serve.replica.replica import Replica
from loramill.settings import ServeSettings
from loramill.types import FrozenModel

#: Prompts under way at once: more than the engine runs, and half of what it lets wait, because requests that a stop
#: string ended still count as waiting until the engine's next step.
_MAX_IN_FLIGHT = EngineConfig().max_waiting // 2

#: Bytes that show a file's kind.
_MAGIC_BYTES = 16

#: Seconds of silence after which is looked whether the engine still runs.
_POLL_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class OfflineCompletion:
    """What came of one prompt.

    Attributes:
        request: the prompt as it was asked.
        text: the answer, as far as it came.
        finish: "stop" or "length"; None where there was an error.
        error: why there is no answer.
        logprobs: of the answer's tokens, if the prompt asks for them.
    """

    request: TextRequest
    text: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish: str | None = None
    error: LoramillError | None = None
    logprobs: tuple[SampledToken, ...] = ()


class OfflineEngine:
    """Answers prompts for the base and any adapter, all mixed in the same batches. Close it, or use it by `with`.

        with OfflineEngine(base, registry.artifacts.fetch, settings.serve) as engine:
            for completion in engine.generate(TextRequest("1", "acme", prompt=text) for text in texts):
                ...

    Args:
        base: the model, of which weights and caches are loaded here.
        source: from a prompt's `version` to a PEFT folder; called in side threads.
        settings: limits and threads of the engine.

    Raises:
        BaseUnusable: the base can't be loaded.
    """

    def __init__(self, base: Base, source: AdapterSource, settings: ServeSettings) -> None:
        self._numbers = count(1)
        self._replica = Replica(base, source, settings.model_copy(update={"max_waiting": 2 * _MAX_IN_FLIGHT}))
        self._loop = asyncio.new_event_loop()
        self._closing = asyncio.Event()
        # A loop of its own, so that it works wherever it is called, and text is made while the engine computes.
        self._thread = threading.Thread(target=self._run, name="offline", daemon=True)
        self._thread.start()

    def __enter__(self) -> OfflineEngine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ends the threads; what is under way is dropped."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._closing.set)
            self._thread.join()
            self._replica.close()

    def generate(self, prompts: Iterable[TextRequest], *, ordered: bool = False) -> Iterator[OfflineCompletion]:
        """Answers as they are done, or in the order of the prompts. Every prompt gets one; an error is in its own.

        Prompts are read, and answers kept, a few hundred at a time. Leaving the iterator drops what is under way.

        Args:
            prompts: any number; `id` is the caller's own.
            ordered: whether an answer waits for those of the prompts before it.

        Raises:
            Unavailable: the engine has stopped.
            Exception: what reading `prompts` raised.
        """
        rest = enumerate(prompts)
        done: SimpleQueue[Future[OfflineCompletion]] = SimpleQueue()
        live: dict[Future[OfflineCompletion], int] = {}
        early: dict[int, OfflineCompletion] = {}
        due = 0
        try:
            while True:
                for place, prompt in islice(rest, _MAX_IN_FLIGHT - len(live) - len(early)):
                    future = asyncio.run_coroutine_threadsafe(self._answer(prompt), self._loop)
                    live[future] = place
                    future.add_done_callback(done.put)
                if not live:
                    return
                future = self._wait(done)
                place = live.pop(future)
                if not ordered:
                    yield future.result()
                    continue
                early[place] = future.result()
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
            # Its own id: those of a file may repeat.
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
    """A line of a JSONL file of prompts, or of a dataset, whose answer is left out.

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
            raise ValueError('write either "prompt" or "messages", with a message that asks')
        if self.completion is not None and self.prompt is None:
            raise ValueError('"completion" belongs to "prompt"')
        return self

    def request(self, number: int, defaults: TextRequest, *, chat: bool) -> TextRequest:
        """The line as a request, with what it doesn't say from `like`."""
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
        asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        if not asked:
            raise LineError('write either "prompt" or "messages", with a message to answer.')
        return replace(defaults, **fields, messages=asked, tools=tools)


def build_request(text: str, defaults: TextRequest, *, chat: bool) -> TextRequest:
    """A request as `like` for the answer to a text, by the chat template, or for how the text goes on."""
    if chat:
        return replace(defaults, messages=(Message(role="user", content=text),))
    return replace(defaults, prompt=text)


class PromptFile:
    """The prompts of a file, read anew at each pass; its length is their number.

    `.txt`: one prompt per line. All other files are JSONL: lines of `{"prompt": …}` or `{"messages": […]}`, the latter
    with optional `tools`, and both with `id`, `max_tokens`, `temperature`, `top_p`, `top_k`, `seed` and `stop`. A
    dataset's lines work unchanged: their answers are left out. Blank lines are skipped. A prompt without an id gets its
    line's number.

    Args:
        path: the file.
        like: what a line doesn't say: version, tenant, sampling.
        chat: whether texts are questions for the chat template; None: those of a .txt are, those of JSONL go on.

    Raises:
        DatasetInvalid: `problems` lists what is wrong, with file, line, field and what to do.
        OSError: it can't be read.
    """

    def __init__(self, path: Path, defaults: TextRequest, *, chat: bool | None = None) -> None:
        self._path = path
        self._defaults = defaults
        self._plain = path.suffix == ".txt"
        self._chat = self._plain if chat is None else chat
        self._length, count, problems = 0, 0, []
        for number, row in self._rows():
            self._length += 1
            try:
                self._read(number, row)
            except DatasetInvalid as error:
                count += 1
                problems += [error.message] if count <= MAX_LISTED else []
        if not self._length:
            raise DatasetInvalid(f"{path.name} has no prompts; write one on each line.")
        if count:
            first = f"; the first {MAX_LISTED}" if count > MAX_LISTED else ""
            head = f"{path.name} has {count} problem{'s' if count > 1 else ''}{first}:"
            raise DatasetInvalid("\n".join([head, *problems]), problems=problems)

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
        where = f"{self._path.name}, line {number}"
        try:
            if self._plain:
                return build_request(
                    decode(row).strip("\r\n"), replace(self._defaults, id=str(number)), chat=self._chat
                )
            parse(row)  # stricter than pydantic, which accepts repeated keys and half surrogate pairs
            return _PromptLine.model_validate_json(row).request(number, self._defaults, chat=self._chat)
        except DatasetInvalid as error:
            raise DatasetInvalid(f"{where}: {error.message}") from error
        except LineError as error:
            raise DatasetInvalid(f"{where}: {error}") from error
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field = ".".join(map(str, first["loc"]))
            raise DatasetInvalid(f"{where}: {field + ': ' if field else ''}{first['msg']}.") from error
