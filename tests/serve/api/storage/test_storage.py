"""Stored completions at a gateway: what is stored, in which memory, and what an outage does."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from loramill.errors import EngineFault, Unavailable
from loramill.registry import Registry
from loramill.registry.feedback import completions
from loramill.serve.api.storage import writer as writer_module
from loramill.serve.api.storage.buffer import CompletionBuffer
from loramill.serve.api.storage.writer import CompletionWriter
from loramill.serve.protocol import TextChunk, TextRequest
from loramill.types import CompletionKind, CompletionRecord

from ....waiting import eventually

SECRET = "a stored text that must not be logged"
MESSAGES: Any = [{"role": "user", "content": SECRET}]


def record(number: int, text: str = SECRET) -> CompletionRecord:
    return CompletionRecord(
        id=f"chatcmpl-{number}",
        kind=CompletionKind.CHAT,
        tenant="acme",
        adapter=None,
        version=None,
        model="tiny",
        request={"messages": [{"role": "user", "content": text}]},
        response={"choices": []},
        created_at=1.0,
    )


@pytest.fixture
def consent(site: Any, tenant: str) -> None:
    with site.http(site.admin_key) as admin:
        assert admin.post(f"/v1/tenants/{tenant}/storage", json={"store_completions": True}).status_code == 200


def test_the_buffer_is_bounded_and_gives_its_memory_back() -> None:
    size = len(record(0).model_dump_json())
    buffer = CompletionBuffer(max_bytes=2 * size)
    assert [buffer.add(record(number)) for number in range(3)] == [True, True, False]
    buffer.remove(buffer.batch()[:1])
    assert buffer.add(record(3)) and [each.id for each in buffer.batch()] == ["chatcmpl-1", "chatcmpl-3"]


class Database:
    """Stands for the registry: fails as long as `error` is set, and always for the poisoned completion."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.poisoned = ""
        self.rows: list[str] = []

    def add(self, _: Registry, batch: list[CompletionRecord]) -> None:
        if self.error is not None:
            raise self.error
        if any(each.id == self.poisoned for each in batch):
            raise ValueError(SECRET)
        self.rows += [each.id for each in batch]


@pytest.fixture
def database(monkeypatch: pytest.MonkeyPatch) -> Database:
    made = Database()
    monkeypatch.setattr(writer_module, "_add", made.add)
    return made


@pytest.mark.anyio
async def test_an_outage_keeps_completions_for_later_in_order(database: Database) -> None:
    writer: Any = CompletionWriter(None)  # type: ignore[arg-type]
    for number in range(250):
        writer.buffer.add(record(number))
    database.error = Unavailable("away")
    await writer.flush()
    assert (database.rows, len(writer.buffer)) == ([], 250)
    database.error = None
    await asyncio.gather(writer.flush(), writer.flush())
    assert database.rows == [f"chatcmpl-{number}" for number in range(250)] and len(writer.buffer) == 0


@pytest.mark.anyio
async def test_one_completion_that_fails_holds_back_no_other(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    writer: Any = CompletionWriter(None)  # type: ignore[arg-type]
    for number in range(3):
        writer.buffer.add(record(number))
    database.poisoned = "chatcmpl-1"
    await writer.flush()
    assert database.rows == ["chatcmpl-0", "chatcmpl-2"] and len(writer.buffer) == 0
    assert "chatcmpl-1" in caplog.text and SECRET not in caplog.text


@pytest.mark.anyio
async def test_what_is_left_is_written_at_the_end(database: Database) -> None:
    writer: Any = CompletionWriter(None)  # type: ignore[arg-type]
    async with writer.running():
        writer.buffer.add(record(1))
    assert database.rows == ["chatcmpl-1"]


def test_an_outage_drops_no_answer(site: Any, client: OpenAI, consent: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:

        def away(*_: Any) -> None:
            raise Unavailable("away")

        patched.setattr(writer_module, "_add", away)
        made = [client.chat.completions.create(model="tiny", messages=MESSAGES, store=True) for _ in range(3)]
        assert all(each.choices[0].message.content for each in made)
    assert [each.id for each in client.chat.completions.list()] == [each.id for each in made]


def test_without_consent_storing_is_refused_with_what_to_set(
    site: Any, client: OpenAI, admin: OpenAI, tenant: str, consent: None, other: str
) -> None:
    with site.openai(site.key(other)) as others, pytest.raises(openai.BadRequestError) as refused:
        others.chat.completions.create(model="tiny", messages=MESSAGES, store=True)
    assert refused.value.param == "store" and f"loramill tenant storage {other} --store" in refused.value.message
    with pytest.raises(openai.BadRequestError, match="OpenAI-Organization"):
        admin.chat.completions.create(model="tiny", messages=MESSAGES, store=True)
    acting = admin.with_options(organization=tenant).chat.completions
    assert acting.retrieve(acting.create(model="tiny", messages=MESSAGES, store=True).id).choices
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="tiny", messages=MESSAGES, store=True, user="u" * 513)
    assert refused.value.param == "user"


def test_store_is_refused_once_the_tenant_stores_as_many_bytes_as_it_may(
    site: Any, client: OpenAI, tenant: str, consent: None
) -> None:
    def limit(stored: int | None) -> None:
        with site.http(site.admin_key) as admin:
            assert admin.post(f"/v1/tenants/{tenant}/limits", json={"stored_bytes": stored}).status_code == 200

    made = client.chat.completions.create(model="tiny", messages=MESSAGES, store=True)
    client.chat.completions.retrieve(made.id)  # written by now
    limit(10)
    try:
        with pytest.raises(openai.RateLimitError, match="may store 10: delete files or completions") as refused:
            client.with_options(max_retries=0).chat.completions.create(model="tiny", messages=MESSAGES, store=True)
        assert refused.value.param == "store"
        assert client.chat.completions.create(model="tiny", messages=MESSAGES).choices, "without store it is answered"
    finally:
        limit(None)


def test_without_store_nothing_is_stored(client: OpenAI, http: httpx.Client, consent: None) -> None:
    client.chat.completions.create(model="tiny", messages=MESSAGES, store=False)
    client.chat.completions.create(model="tiny", messages=MESSAGES)
    client.completions.create(model="tiny", prompt=SECRET)
    assert list(client.chat.completions.list()) == [] and http.get("/v1/completions").json()["data"] == []


class Failing:
    """Answers a part, then fails or waits for ever."""

    def __init__(self, error: Exception | None) -> None:
        self.error = error
        self.closed = False

    async def generate(self, request: TextRequest) -> AsyncIterator[TextChunk]:
        try:
            yield TextChunk("part", prompt_tokens=1, completion_tokens=1)
            if self.error is not None:
                raise self.error
            await asyncio.sleep(60)
        finally:
            self.closed = True

    async def ready(self) -> None: ...


def test_a_stream_is_stored_when_it_ends(client: OpenAI, consent: None) -> None:
    stream = client.chat.completions.create(
        model="tiny", messages=MESSAGES, store=True, stream=True, n=2, stream_options={"include_usage": True}
    )
    *chunks, last = stream
    stored = client.chat.completions.retrieve(last.id)
    assert stored.usage == last.usage
    for choice in stored.choices:
        texts = [each.delta.content or "" for chunk in chunks for each in chunk.choices if each.index == choice.index]
        assert choice.message.content == "".join(texts) and choice.finish_reason == "stop"


@pytest.mark.parametrize("error", [EngineFault("broken"), None], ids=["failed", "cancelled"])
@pytest.mark.parametrize("stream", [True, False])
def test_what_does_not_end_normally_is_not_stored(
    site: Any, client: OpenAI, consent: None, error: Exception | None, stream: bool
) -> None:
    site.backend.now = backend = Failing(error)
    options: Any = {"model": "tiny", "messages": MESSAGES, "store": True, "stream": stream}
    if error is not None:
        with pytest.raises(openai.APIError):
            list(client.chat.completions.create(**options))
    elif stream:
        with client.chat.completions.create(**options) as answer:
            next(iter(answer))
    else:
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.5).chat.completions.create(**options)
    eventually(lambda: backend.closed)
    assert list(client.chat.completions.list()) == []


def test_a_stored_text_does_not_reach_the_log(
    site: Any, client: OpenAI, http: httpx.Client, consent: None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        made = client.chat.completions.create(model="tiny", messages=MESSAGES, store=True, user="u-private")
        feedback = {"completion_id": made.id, "correction": SECRET, "reason": SECRET}
        assert http.post("/v1/feedback", json=feedback).status_code == 200
        assert SECRET in http.get("/v1/feedback", params={"texts": "true"}).text
        # A statement that fails in the database: its parameters are the text.
        with pytest.raises(Exception) as failed, site.registry.writing() as session:
            completions.add_many(session, [completions.to_record(completions.get(session, made.id, None))])
            session.execute(completions.CompletionRow.__table__.insert().values(id=made.id, model=SECRET))
        logging.getLogger("loramill.gateway").error("failed", exc_info=failed.value)
        http.delete("/v1/feedback", params={"user": "u-private"})
    ours = [each for each in caplog.records if each.name.startswith(("loramill", "uvicorn", "sqlalchemy"))]
    formatted = "\n".join(logging.Formatter().format(each) + str(each.__dict__) for each in ours)
    assert "failed" in formatted and SECRET not in formatted
    audited = http.get("/v1/audit").text
    assert "feedback.give" in audited and SECRET not in audited and "u-private" not in audited
