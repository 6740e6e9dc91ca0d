"""The datasets and the job spec of a nightly run."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramill.data.new_data import REPLAY_EXAMPLES, sample
from loramill.errors import InvalidRequest
from loramill.models.catalog import Base
from loramill.names import AdapterName
from loramill.pipelines.nightly.collection.next_job import next_spec
from loramill.pipelines.nightly.collection.past import jsonl_rows
from loramill.pipelines.nightly.collection.plan import CollectionRules, plan_training
from loramill.pipelines.nightly.definition import TrainDefinition
from loramill.registry import Registry, adapters, datasets, jobs, nightly, tenants
from loramill.submission.defaults import LEARNING_RATE
from loramill.submission.options import JobOptions
from loramill.types import JobSpec, VersionRecord

from ....databases import create_sqlite_database

NAME = AdapterName("acme", "support")


def row(question: str, answer: str) -> bytes:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": messages}).encode()


OLD = [row(f"old question {i}", "old") for i in range(100)]
OLD_VALID = [row(f"old held-out question {i}", "old") for i in range(10)]
NEW = [row(f"new question {i}", "new") for i in range(40)]


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    database = f"sqlite:///{tmp_path / 'record.db'}"
    create_sqlite_database(database)
    registry = Registry.open(database, (tmp_path / "artifacts").as_uri())
    with registry.writing() as session:
        tenants.create(session, "acme")
    return registry


def dataset(registry: Registry, rows: list[bytes]) -> str:
    raw = b"\n".join(rows) + b"\n"
    artifact = registry.artifacts.put({"data.jsonl": raw})
    with registry.writing() as session:
        return datasets.create(session, "acme", "rows.jsonl", artifact, len(raw), len(rows)).id


def rows_of(registry: Registry, dataset_id: str) -> list[bytes]:
    with registry.reading() as session:
        return jsonl_rows(registry.artifacts.read(datasets.get(session, dataset_id).artifact, "data.jsonl"))


def champion(registry: Registry, base: Base, **changes: Any) -> JobSpec:
    """An adapter with a champion, as a finished job leaves it."""
    fields = {
        "base": base.fingerprint,
        "adapter": str(NAME),
        "train": dataset(registry, OLD),
        "valid": dataset(registry, OLD_VALID),
        "steps": 7,
        "batch_size": 8,
        "learning_rate": 2e-3,
        "rank": 4,
    }
    spec = JobSpec(**fields | changes)
    version = registry.artifacts.put({"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights"})
    with registry.writing() as session:
        job = jobs.submit(session, spec, {})
        jobs.lease(session, "worker", now=time.time(), seconds=60, max_attempts=1)
        record = VersionRecord(
            id=version, adapter=str(NAME), job=job.id, base=base.fingerprint, bytes=7, created_at=time.time()
        )
        jobs.publish(session, job.id, 1, record)
    return spec


def collected(
    registry: Registry, base: Base, train: list[bytes], valid: list[bytes] | None, rules: CollectionRules | None = None
) -> dict:
    train_id, valid_id = dataset(registry, train), dataset(registry, valid) if valid else None
    with registry.writing() as session:
        nightly.add_data(session, NAME, train_id, valid_id)
        run = nightly.open_run(session)
        new_data = nightly.collect(session, run.id, NAME)
        assert new_data is not None
        return plan_training(session, registry.artifacts, NAME, new_data, base, run.id, rules)


def test_a_champion_is_trained_further_with_a_replay_of_old_data(registry: Registry, base: Base) -> None:
    old = champion(registry, base)
    plan = collected(registry, base, NEW, None)
    spec = JobSpec.model_validate(plan["spec"])
    with registry.reading() as session:
        now = adapters.get(session, NAME).champion
    assert (spec.start_from, plan["champion"]) == (now, now)
    assert (spec.rank, spec.learning_rate) == (old.rank, old.learning_rate / 2)
    train = rows_of(registry, spec.train)
    held_out = rows_of(registry, plan["slices"]["new"])
    assert len(held_out) == 4
    assert not set(train) & set(held_out)
    assert set(train) | set(held_out) >= set(NEW)
    assert len(set(train) & set(OLD)) == REPLAY_EXAMPLES
    assert plan["slices"]["before"] == old.valid
    assert rows_of(registry, spec.valid or "") == OLD_VALID + held_out
    assert (spec.epochs, spec.steps) == (3, 3 * -(-len(train) // 8)), "two passes would be 26 steps"


@pytest.mark.parametrize(("train_on", "expected"), [("all", "all"), ("only_last", "only_last"), ("last", "all")])
def test_the_next_job_keeps_train_on_if_it_was_chosen(
    registry: Registry, base: Base, train_on: str, expected: str
) -> None:
    """Older jobs have "last" by default, which no one chose."""
    sweep = {"candidates": ({"rank": 4}, {"rank": 8})}
    changes = {"train_on": train_on, "rank": 4, "alpha": 32.0, "steps": 9, **sweep}
    old = champion(registry, base).model_copy(update=changes)
    with registry.reading() as session:
        train, valid = (datasets.get(session, each) for each in (old.train, old.valid or ""))
    new = next_spec(old, "v", train, valid, base)
    assert (new.train_on, new.rank, new.alpha) == (expected, 4, 32.0)
    assert new.candidates == ()  # the best candidate of a sweep is retrained, and no other


def test_after_preference_tuning_new_answers_are_trained_without_the_preferences(
    registry: Registry, base: Base
) -> None:
    pairs = dataset(registry, [b'{"prompt": "a", "chosen": "b", "rejected": "c"}'])
    champion(registry, base, train=pairs, valid=pairs, objective="dpo", learning_rate=1e-5)
    plan = collected(registry, base, NEW, None)
    spec = JobSpec.model_validate(plan["spec"])
    assert (spec.objective, spec.learning_rate, spec.start_from) == ("sft", LEARNING_RATE / 2, plan["champion"])
    assert set(rows_of(registry, spec.train)) <= set(NEW)
    assert list(plan["slices"]) == ["new"]


def test_new_data_is_evaluated_on_its_own_validation_data(registry: Registry, base: Base) -> None:
    champion(registry, base)
    own = [row(f"new held-out question {i}", "new") for i in range(5)]
    plan = collected(registry, base, NEW, own)
    assert sorted(rows_of(registry, plan["slices"]["new"])) == sorted(own)
    assert set(rows_of(registry, plan["spec"]["train"])) >= set(NEW)


def test_old_data_that_was_deleted_is_left_out(registry: Registry, base: Base) -> None:
    old = champion(registry, base)
    with registry.writing() as session:
        for deleted in (old.train, old.valid):
            datasets.delete(session, deleted or "")
    plan = collected(registry, base, NEW, None)
    assert list(plan["slices"]) == ["new"] and plan["spec"]["start_from"] == plan["champion"]
    assert set(rows_of(registry, plan["spec"]["train"])) <= set(NEW)
    assert rows_of(registry, plan["spec"]["valid"]) == rows_of(registry, plan["slices"]["new"])


def test_a_first_version_is_trained_from_scratch(registry: Registry, base: Base) -> None:
    plan = collected(registry, base, NEW, None)
    spec = JobSpec.model_validate(plan["spec"])
    assert (spec.start_from, plan["champion"], list(plan["slices"])) == (None, None, ["new"])
    assert len(rows_of(registry, spec.train)) + len(rows_of(registry, plan["slices"]["new"])) == len(NEW)


#: Messages in the shape of an intent data set: one instruction for all, a short message, a label.
MESSAGES = [
    f"{begin} {what} {end}"
    for begin in ("could you please tell me about", "i have a question regarding", "help, something is wrong with")
    for what in ("the balance of my savings account", "a transfer to my landlord", "the card that i lost on monday")
    for end in ("before the end of this month", "while i travel through portugal", "since your app shows an error", "")
]


def intent(message: str) -> bytes:
    system = {"role": "system", "content": "You label the messages of a bank's customers with one of fifteen intents."}
    dialog = [{"role": "user", "content": message}, {"role": "assistant", "content": "banking"}]
    return json.dumps({"messages": [system, *dialog]}).encode()


def test_a_leak_into_a_later_run_is_removed_and_counted(registry: Registry, base: Base) -> None:
    first = collected(registry, base, [intent(each) for each in MESSAGES[:24]], None)
    held = rows_of(registry, first["slices"]["new"])
    assert (first["counts"]["train"], first["counts"]["held_out"], len(held)) == (22, 2, 2)
    verbatim, edited = (json.loads(row)["messages"][1]["content"] for row in held)
    with registry.writing() as session:
        nightly.finish_run(session, nightly.open_run(session).id)
    leaks = [intent(verbatim.upper()), intent(edited.replace("e", "ee", 1))]
    second = collected(registry, base, [*leaks, *(intent(each) for each in MESSAGES[24:])], None)
    counts = second["counts"]
    assert (counts["leaked"], counts["repeated"], counts["train"] + counts["held_out"]) == (2, 0, 12)
    trained = {json.loads(row)["messages"][1]["content"].lower() for row in rows_of(registry, second["spec"]["train"])}
    assert not trained & {verbatim, edited, edited.replace("e", "ee", 1)}


def test_the_validation_file_of_an_older_champion_is_held_out(registry: Registry, base: Base) -> None:
    champion(registry, base)
    plan = collected(registry, base, [*NEW, *OLD_VALID[:3], *OLD[:2]], None)
    counts = plan["counts"]
    assert (counts["leaked"], counts["repeated"]) == (3, 2)
    assert not set(rows_of(registry, plan["spec"]["train"])) & set(OLD_VALID)


def test_the_order_of_files_and_rows_changes_no_dataset(registry: Registry, base: Base) -> None:
    plan = collected(registry, base, NEW, None)
    with registry.writing() as session:
        run = nightly.list_runs(session)[0]
        nightly.release(session, run.id, NAME)
        nightly.drop(session, NAME)
        nightly.finish_run(session, run.id)
    again = collected(registry, base, NEW[::-1], None)
    assert rows_of(registry, plan["spec"]["train"]) == rows_of(registry, again["spec"]["train"])
    assert rows_of(registry, plan["slices"]["new"]) == rows_of(registry, again["slices"]["new"])


answers = st.lists(st.integers(0, 50), min_size=2, max_size=40).map(lambda ns: [row(str(n), "x") for n in ns])


@given(rows=answers, count=st.integers(0, 10))
def test_a_sample_does_not_depend_on_the_order(rows: list[bytes], count: int) -> None:
    assert sample(rows, count) == sample(rows[::-1], count)
    assert len(sample(rows, count)) == min(count, len(rows))


def test_rows_are_split_at_line_feeds_alone() -> None:
    """Carriage returns are white space in JSON, and concatenated files have byte order marks in the middle."""
    first, second = b'{"prompt": "a\xe2\x80\xa8b",\r"completion": "c"}', b'{"prompt": "d", "completion": "e"}'
    assert jsonl_rows(first + b"\r\n\r\n\xef\xbb\xbf" + second) == [first, second]


def test_the_learning_rate_is_halved_once_and_not_by_each_run(registry: Registry, base: Base) -> None:
    old = champion(registry, base, learning_rate=2e-3)
    with registry.reading() as session:
        train, valid = (datasets.get(session, each) for each in (old.train, old.valid or ""))
    rates = []
    for _ in range(5):
        old = next_spec(old, "v", train, valid, base)
        rates.append(old.learning_rate)
    assert rates == [1e-3] * 5


def planned(registry: Registry, base: Base, start: str, **options: Any) -> dict:
    train = TrainDefinition(start=start, options=JobOptions(**options))
    return collected(registry, base, NEW, None, CollectionRules(train=train))


def test_new_weights_are_trained_on_all_old_and_new_data(registry: Registry, base: Base) -> None:
    old = champion(registry, base, learning_rate=2e-3)
    plan = planned(registry, base, "fresh")
    spec = JobSpec.model_validate(plan["spec"])
    held_out = rows_of(registry, plan["slices"]["new"])
    assert spec.start_from is None and "fresh" not in plan and plan["champion"] is not None
    assert (spec.rank, spec.learning_rate, spec.valid is None) == (old.rank, 2e-3, False)
    assert set(rows_of(registry, spec.train)) == set(OLD) | set(NEW) - set(held_out)


def test_both_starts_share_the_validation_file(registry: Registry, base: Base) -> None:
    champion(registry, base)
    plan = planned(registry, base, "both")
    continued, fresh = (JobSpec.model_validate(plan[each]) for each in ("spec", "fresh"))
    assert continued.start_from == plan["champion"] and fresh.start_from is None
    assert continued.valid == fresh.valid and continued.train != fresh.train
    assert set(rows_of(registry, fresh.train)) > set(rows_of(registry, continued.train)) & set(NEW)


def test_a_first_version_has_one_start_and_the_options(registry: Registry, base: Base) -> None:
    plan = planned(registry, base, "both", rank=16, epochs=2, batch_size=4, sweep={"learning_rate": [1e-4, 1e-3]})
    spec = JobSpec.model_validate(plan["spec"])
    assert "fresh" not in plan
    assert (spec.rank, spec.alpha, spec.epochs, spec.batch_size) == (16, 32.0, 2, 4)
    assert [each["learning_rate"] for each in spec.candidates] == [1e-4, 1e-3]


def test_options_change_the_champions_job(registry: Registry, base: Base) -> None:
    old = champion(registry, base, dropout=0.1)
    spec = JobSpec.model_validate(planned(registry, base, "champion", learning_rate=3e-4, batch_size=4, seed=7)["spec"])
    assert (spec.learning_rate, spec.batch_size, spec.seed, spec.dropout) == (3e-4, 4, 7, 0.1)
    assert spec.rank == old.rank and spec.epochs is not None
    assert spec.steps == spec.epochs * -(-len(rows_of(registry, spec.train)) // 4)


def test_a_number_of_steps_replaces_epochs(registry: Registry, base: Base) -> None:
    champion(registry, base)
    spec = JobSpec.model_validate(planned(registry, base, "champion", steps=5)["spec"])
    assert (spec.steps, spec.epochs) == (5, None)


def test_another_rank_needs_new_weights(registry: Registry, base: Base) -> None:
    champion(registry, base)
    with pytest.raises(InvalidRequest, match="rank is 16, but the champion that training continues has 4"):
        planned(registry, base, "champion", rank=16)


def test_new_weights_may_have_another_rank(registry: Registry, base: Base) -> None:
    champion(registry, base)
    assert (planned(registry, base, "fresh", rank=16)["spec"]["rank"]) == 16


def test_a_row_that_no_job_can_read_is_quarantined_not_fatal(registry: Registry, base: Base) -> None:
    long = row("word " * 2000, "long")
    answers = {
        kind: [{"role": "assistant", "content": text}] for kind, text in (("chosen", "a"), ("rejected", "b " * 2000))
    }
    pair = {"prompt": [{"role": "user", "content": "which?"}]} | answers
    plan = collected(registry, base, [*NEW[:20], long, *NEW[20:], json.dumps(pair).encode()], None)
    assert plan["counts"]["quarantined"] == 2 and long not in rows_of(registry, plan["spec"]["train"])
    first, second = plan["quarantine"]["reasons"]
    assert first.startswith("rows.jsonl, line 21: it has 2") and "the limit is 1024; shorten it" in first
    assert second.startswith("rows.jsonl, line 42: with its rejected answer it has 2")


def test_the_limit_of_a_row_is_that_of_the_job(registry: Registry, base: Base) -> None:
    medium = row("word " * 300, "medium")
    champion(registry, base, max_length=200)
    assert collected(registry, base, [*NEW, medium], None)["counts"]["quarantined"] == 1
    longer = TrainDefinition.model_validate({"options": {"max_length": 600}})
    again = [row(f"another question {i}", "new") for i in range(40)]
    rules = CollectionRules(train=longer)
    assert collected(registry, base, [*again, medium], None, rules)["counts"]["quarantined"] == 0
