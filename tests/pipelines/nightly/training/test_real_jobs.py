"""A run with real jobs and real answers of a tiny base: both starts, on-policy replay, and preferences after them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loramill.names import AdapterName
from loramill.pipelines.nightly.definition import NightlyDefinition
from loramill.pipelines.nightly.run import run_nightly
from loramill.registry import Registry, adapters, datasets, jobs, migrate, nightly, tenants
from loramill.settings import Settings
from loramill.types import JobStatus
from loramill_bench.nightly.forgetting import LocalPool

from ....jobs.conftest import base_of, tiny_chat_base
from ..cluster import rows
from .test_preferences import pairs

__all__ = ["tiny_chat_base"]
NAME = AdapterName("acme", "a")


def add(registry: Registry, lines: list[dict[str, Any]]) -> None:
    raw = "".join(json.dumps(line) + "\n" for line in lines).encode()
    artifact = registry.artifacts.put({"data.jsonl": raw})
    with registry.writing() as session:
        file = datasets.create(session, "acme", "rows.jsonl", artifact, len(raw), len(lines))
        nightly.add_data(session, NAME, file.id, None)


def test_real_jobs_train_both_starts_and_then_preferences(
    tiny_chat_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = base_of(tiny_chat_base, tmp_path)
    monkeypatch.setenv("LORAMILL_BASE", str(tiny_chat_base))
    settings = Settings.load(home=tmp_path / "home")
    url = f"sqlite:///{tmp_path / 'loramill.db'}"
    migrate(url)
    registry = Registry.open(url, (tmp_path / "artifacts").as_uri())
    with registry.writing() as session:
        tenants.create(session, "acme")
    pool = LocalPool(base, registry, settings)
    gate = {"confidence": 0.5, "max_loss": 1.0}  # any version passes that is not worse
    options = {"epochs": 1, "batch_size": 8}
    definition = NightlyDefinition.model_validate({"train": {"start": "both", "options": options}, "gate": gate})
    add(registry, rows(60, "old"))
    run_nightly(registry, settings, gateway=pool, definition=definition)
    with registry.reading() as session:
        champion = adapters.get(session, NAME).champion
    assert champion is not None, "the first version"

    add(registry, rows(60, "new"))
    add(registry, pairs(30))
    run = run_nightly(registry, settings, gateway=pool, definition=definition)
    with registry.reading() as session:
        steps = {step.step: step.result for step in nightly.list_steps(session, run.id)}
        trained = {kind: jobs.get(session, each["job"]) for kind, each in steps["train"]["jobs"].items()}
    assert {job.status for job in trained.values()} == {JobStatus.SUCCEEDED}
    assert {kind: job.spec.objective for kind, job in trained.items()} == {
        "champion": "sft",
        "fresh": "sft",
        "preferences": "dpo",
    }
    losses = [trained[kind].valid_loss for kind in ("champion", "fresh")]
    best = "champion" if losses[0] is not None and losses[1] is not None and losses[0] <= losses[1] else "fresh"
    assert trained["preferences"].spec.start_from == trained[best].version
    assert (
        steps["train"]["choice"].endswith("Then trained on preferences.") and "unknown" not in steps["train"]["choice"]
    )
    assert steps["train"]["version"] == trained["preferences"].version
    replay = steps["collect"]["replay"]
    assert (replay["prompts"] > 0, replay["unanswered"], replay["on_policy"]) == (True, 0, 0), (
        "a tiny base is never right"
    )
    assert set(steps["evaluate"]["slices"]) == {"new", "before"}
    registry.close()
