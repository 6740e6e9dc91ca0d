"""Stored completions and feedback with the unmodified `openai` client, on the real system."""

from __future__ import annotations

from pathlib import Path

import httpx
import openai
import pytest
import torch

from loramill.models.catalog import Base
from loramill.pipelines.nightly.sources.feedback import collect_feedback
from loramill.registry import datasets, nightly
from loramill.serve.model import load_decoder
from loramill_bench.engine.harness import write_adapters

SECRET = "The parrot hides under Platform Nine."


@pytest.fixture(scope="module")
def initech(mill, base: Base, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A key of a tenant that consents, with one adapter."""
    torch.manual_seed(7)
    decoder = load_decoder(base.folder, dtype=torch.bfloat16, threads=1)
    [folder] = write_adapters(decoder, tmp_path_factory.mktemp("drawn"), 1)
    key = mill.tenant("initech")
    with mill.client() as admin:
        admin.adapters.import_folder("initech/bot", folder)
    return key


def log_files(home: Path) -> list[Path]:
    """Everything that the processes of the system have written but the database and the artifacts."""
    return [path for path in home.rglob("*") if path.is_file() and ("logs" in path.parts or path.suffix == ".log")]


def test_a_completion_is_stored_rated_corrected_and_deleted(mill, initech: str) -> None:
    messages = [{"role": "user", "content": SECRET}]
    with mill.openai(initech) as client, mill.client(initech) as own:
        create = client.chat.completions.create
        options = {"model": "initech/bot", "messages": messages, "max_tokens": 8, "store": True, "user": "ann"}
        with pytest.raises(openai.BadRequestError, match="loramill tenant storage initech --store"):
            create(**options)
        ran = mill.run("tenant", "storage", "initech", "--store", "--days", "3")
        assert ran.returncode == 0, ran.stderr
        made = create(**options, metadata={"page": "cards"})
        chunks = list(create(**{**options, "user": "bob"}, stream=True))
        assert [each.id for each in client.chat.completions.list()] == [made.id, chunks[0].id]
        assert [each.id for each in client.chat.completions.list(metadata={"page": "cards"})] == [made.id]
        stored = client.chat.completions.retrieve(made.id)
        assert stored.choices[0].message == made.choices[0].message
        [message] = client.chat.completions.messages.list(made.id)
        assert message.content == SECRET
        for id_ in (made.id, chunks[0].id):
            own.feedback.give(id_, rating="bad", correction=f"No. {SECRET}", reason=SECRET)
        [collected] = collect_feedback(mill.registry)
        assert (collected.examples, collected.pairs) == (2, 2)
        removed = own.feedback.delete_user("ann")
        assert (removed.completions, removed.files) == (1, ())
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.retrieve(made.id)
        with mill.registry.reading() as session:
            assert not [each for each in nightly.pending_data(session) if each.adapter == "initech/bot"]
        # What is left of the withdrawn files is collected again.
        [collected] = collect_feedback(mill.registry)
        assert (collected.examples, collected.pairs) == (1, 1)
        assert client.chat.completions.delete(chunks[0].id).deleted
        assert list(client.chat.completions.list()) == [] == list(own.feedback.list())
        with mill.registry.reading() as session:
            assert datasets.list_datasets(session, "initech") == []


def test_another_tenant_finds_nothing(mill, initech: str) -> None:
    with mill.openai(initech) as client, mill.openai(mill.tenant("hooli")) as other:
        made = client.chat.completions.create(
            model="initech/bot", messages=[{"role": "user", "content": SECRET}], max_tokens=4, store=True
        )
        assert list(other.chat.completions.list()) == []
        for act in (other.chat.completions.retrieve, other.chat.completions.delete):
            with pytest.raises(openai.NotFoundError):
                act(made.id)
        with httpx.Client(base_url=mill.settings.gateway, trust_env=False) as http:
            headers = {"authorization": f"Bearer {other.api_key}"}
            rated = http.post("/v1/feedback", json={"completion_id": made.id, "rating": 1}, headers=headers)
            assert rated.status_code == 404
        assert client.chat.completions.delete(made.id).deleted


def test_a_stored_text_is_in_no_log(mill) -> None:
    files = log_files(mill.home)
    assert any("chat/completions" in path.read_text(errors="replace") for path in files)
    assert not [path for path in files if SECRET in path.read_text(errors="replace")]
