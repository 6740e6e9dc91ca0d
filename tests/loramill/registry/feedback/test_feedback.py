"""Stored completions and feedback in the registry, on both databases."""

import time
from typing import Any

import pytest
from sqlalchemy import select

from loramill.errors import InvalidRequest, NotFound, QuotaExceeded
from loramill.names import AdapterName
from loramill.registry import Registry, adapters, datasets, deletion, nightly, renaming, tenants
from loramill.registry.database.tables import CompletionRow, DeletedUserRow, FeedbackRow
from loramill.registry.feedback import completions, ratings, use
from loramill.types import CompletionKind, CompletionRecord, CompletionStorage, Limits, Rating

CHAT = CompletionKind.CHAT


def completion(number: int, tenant: str = "acme", **changes: Any) -> CompletionRecord:
    choices = [{"index": index, "message": {"role": "assistant", "content": f"answer {index}"}} for index in range(2)]
    fields = {
        "id": f"chatcmpl-{tenant}-{number}",
        "kind": CHAT,
        "tenant": tenant,
        "adapter": f"{tenant}/support",
        "version": "a" * 64,
        "model": f"{tenant}/support",
        "request": {"messages": [{"role": "user", "content": f"question {number}"}], "tools": []},
        "response": {"id": f"chatcmpl-{tenant}-{number}", "choices": choices},
        "created_at": 1000.0 + number,
    }
    return CompletionRecord.model_validate(fields | changes)


@pytest.fixture
def consenting(registry: Registry) -> Registry:
    """Two tenants that consent, each with an adapter."""
    with registry.writing() as session:
        for tenant in ("acme", "globex"):
            tenants.create(session, tenant)
            tenants.set_storage(session, tenant, CompletionStorage(store_completions=True))
            adapters.get_or_create(session, AdapterName(tenant, "support"))
    return registry


def count(registry: Registry) -> tuple[int, int]:
    with registry.reading() as session:
        return session.query(CompletionRow).count(), session.query(FeedbackRow).count()


def add(registry: Registry, *records: CompletionRecord) -> int:
    with registry.writing() as session:
        return completions.add_many(session, records)


def test_a_batch_that_is_repeated_is_stored_once(consenting):
    batch = [completion(1), completion(2)]
    assert (add(consenting, *batch), add(consenting, *batch), add(consenting, *batch, completion(3))) == (2, 0, 1)
    with consenting.reading() as session:
        assert completions.to_record(completions.get(session, batch[0].id, "acme")) == batch[0]


def test_nothing_is_stored_without_consent_or_for_what_was_deleted(consenting):
    with consenting.writing() as session:
        tenants.set_storage(session, "globex", CompletionStorage(store_completions=False))
        tenants.create(session, "never")
    gone = completion(2, adapter="acme/gone")
    nowhere = completion(1, "nowhere", adapter=None)
    assert add(consenting, completion(1), gone, completion(1, "globex"), completion(1, "never"), nowhere) == 1


def test_completions_are_listed_by_page_model_and_metadata(consenting):
    add(consenting, *(completion(n, metadata={"parity": str(n % 2)}, model=f"acme/support@{n}") for n in range(5)))
    add(consenting, completion(9, "globex"), completion(7, kind=CompletionKind.TEXT))

    def listed(**how: Any) -> list[str]:
        with consenting.reading() as session:
            return [each.id[-1] for each in completions.list_completions(session, "acme", CHAT, **how)]

    assert listed() == list("01234")
    assert listed(oldest_first=False, limit=2) == list("43")
    assert listed(after="chatcmpl-acme-1", limit=2) == list("23")
    assert listed(after="chatcmpl-acme-3", oldest_first=False) == list("210")
    assert listed(metadata={"parity": "1"}) == list("13") and listed(model="acme/support@4") == ["4"]
    with pytest.raises(NotFound):
        listed(after="chatcmpl-globex-9")


def test_feedback_is_idempotent_and_the_latest_counts(consenting):
    add(consenting, completion(1))
    id_ = completion(1).id
    with consenting.writing() as session:
        first = ratings.give(session, id_, "acme", rating=Rating.BAD, reason="rude")
        again = ratings.give(session, id_, "acme", rating=Rating.BAD, reason="rude")
        assert again == first
        other = ratings.give(session, id_, "acme", choice=1, rating=Rating.GOOD)
        latest = ratings.give(session, id_, "acme", correction="sorry")
    assert (latest.id, latest.rating, latest.correction, latest.reason) == (first.id, None, "sorry", None)
    assert other.id != first.id and count(consenting) == (1, 2)
    with pytest.raises(InvalidRequest, match="2 answers"), consenting.writing() as session:
        ratings.give(session, id_, "acme", choice=2, rating=Rating.GOOD)


def test_another_tenants_completion_does_not_exist(consenting):
    add(consenting, completion(1))
    id_ = completion(1).id
    for act in (
        lambda session, name: completions.get(session, name, "globex"),
        lambda session, name: ratings.give(session, name, "globex", rating=Rating.GOOD),
        lambda session, name: ratings.delete(session, name, "globex"),
        lambda session, name: completions.delete(session, name, "globex", CHAT),
        lambda session, name: completions.set_metadata(session, name, "globex", CHAT, {}),
    ):
        messages = set()
        for name in (id_, "chatcmpl-none"):
            with pytest.raises(NotFound) as refused, consenting.writing() as session:
                act(session, name)
            messages.add(refused.value.message.replace(name, ""))
        assert len(messages) == 1
    with consenting.writing() as session:
        assert completions.delete_user(session, "globex", "u").completions == 0
    assert count(consenting) == (1, 0)


def test_deletion_by_completion_and_by_user_takes_the_feedback_along(consenting):
    add(consenting, *(completion(n, user="ann" if n < 3 else "bob") for n in range(1, 5)))
    add(consenting, completion(1, "globex", user="ann"))
    with consenting.writing() as session:
        for number in range(1, 5):
            ratings.give(session, completion(number).id, "acme", rating=Rating.GOOD)
        assert ratings.delete(session, completion(4).id, "acme").feedback == 1
    assert count(consenting) == (5, 3)
    with consenting.writing() as session:
        removed = completions.delete(session, completion(3).id, "acme", CHAT)
        assert (removed.completions, removed.feedback, removed.files) == (1, 1, ())
        removed = completions.delete_user(session, "acme", "ann")
        assert (removed.completions, removed.feedback) == (2, 2)
    assert count(consenting) == (2, 0)


def test_what_other_gateways_write_after_the_deletion_of_a_user_is_not_stored(consenting):
    with consenting.writing() as session:
        completions.delete_user(session, "acme", "ann")
    now = time.time()
    before, after = completion(1, user="ann", created_at=now - 60), completion(2, user="ann", created_at=now + 60)
    others = [completion(3, user="bob", created_at=now - 60), completion(1, "globex", user="ann", created_at=now - 60)]
    assert add(consenting, before, after, *others) == 3
    with consenting.writing() as session:
        with pytest.raises(NotFound):
            completions.get(session, before.id, "acme")
        assert completions.delete_user(session, "acme", "ann").completions == 1
    assert add(consenting, before) == 0
    with consenting.writing() as session:
        completions.expire(session, 1e9, now=now + (completions.DELETION_DAYS + 1) * 86_400)
        assert session.scalars(select(DeletedUserRow.digest)).all() == []


def test_stored_completions_count_toward_the_limit_of_their_tenant(consenting):
    with consenting.reading() as session:
        assert tenants.count_stored_bytes(session, "acme") == 0
    add(consenting, completion(1), completion(2), completion(1, "globex"))
    size = sum(len(each.model_dump_json()) for each in (completion(1), completion(2)))
    with consenting.writing() as session:
        assert tenants.count_stored_bytes(session, "acme") == size
        tenants.set_limits(session, "acme", Limits(stored_bytes=size + 10))
        tenants.check_storage_quota(session, "acme", 10)
        with pytest.raises(QuotaExceeded, match=f"stores {size} bytes and may store {size + 10}"):
            tenants.check_storage_quota(session, "acme", 11)
        completions.delete(session, completion(1).id, "acme", CHAT)
        tenants.check_storage_quota(session, "acme", 11)


def test_completions_expire_after_the_days_of_their_tenant(consenting):
    now = time.time()
    ages = {1: 0.5, 2: 2.0, 3: 40.0}
    for tenant in ("acme", "globex"):
        add(consenting, *(completion(n, tenant, created_at=now - days * 86_400) for n, days in ages.items()))
    with consenting.writing() as session:
        ratings.give(session, completion(3).id, "acme", rating=Rating.GOOD)
        tenants.set_storage(session, "globex", CompletionStorage(store_completions=True, completion_days=1))
        assert completions.expire(session, 30, now=now) == 1 + 2
    with consenting.reading() as session:
        left = {(row.tenant, row.id[-1]) for row in session.query(CompletionRow)}
    assert left == {("acme", "1"), ("acme", "2"), ("globex", "1")} and count(consenting)[1] == 0


def test_a_rename_takes_completions_along_and_deletions_remove_them(consenting):
    for tenant in ("acme", "globex"):
        add(consenting, completion(1, tenant), completion(2, tenant, adapter=None, model="base"))
        with consenting.writing() as session:
            ratings.give(session, completion(1, tenant).id, tenant, correction="better")
    with consenting.writing() as session:
        renaming.rename(session, AdapterName("acme", "support"), AdapterName("acme", "help"))
        [(record, _)] = ratings.list_feedback(session, "acme", adapter="acme/help")
        assert (record.adapter, record.model) == ("acme/help", "acme/support")
        assert use.adapters_with_unused(session) == ["acme/help", "globex/support"]
        deletion.delete_adapter(session, "acme/help")
    assert count(consenting) == (3, 1)
    with consenting.writing() as session:
        deletion.delete_tenant(session, "globex")
    assert count(consenting) == (1, 0)


def test_feedback_of_a_tenant_without_consent_is_not_used(consenting):
    add(consenting, completion(1))
    with consenting.writing() as session:
        ratings.give(session, completion(1).id, "acme", correction="better")
        assert len(use.lock_unused(session, "acme/support")) == 1
        tenants.set_storage(session, "acme", CompletionStorage(store_completions=False))
        assert use.lock_unused(session, "acme/support") == [] == use.adapters_with_unused(session)


@pytest.fixture
def used(consenting: Registry) -> tuple[Registry, str]:
    """Two corrections in one file of new data."""
    add(consenting, completion(1), completion(2))
    with consenting.writing() as session:
        for number in (1, 2):
            ratings.give(session, completion(number).id, "acme", correction="better")
        file = datasets.create(session, "acme", "f.jsonl", "d" * 64, 10, 2).id
        nightly.add_data(session, AdapterName("acme", "support"), file, None)
        use.mark_examples(session, [each.id for each in use.lock_unused(session, "acme/support")], file)
        assert not any(each.for_example for each in use.lock_unused(session, "acme/support"))
    return consenting, file


def test_a_deletion_withdraws_the_file_that_no_run_has_collected(used):
    registry, file = used
    with registry.writing() as session:
        assert completions.delete(session, completion(1).id, "acme", CHAT).files == ()
        assert nightly.pending_data(session) == []
        [left] = use.lock_unused(session, "acme/support")
        assert left.for_example and left.completion.id == completion(2).id
        with pytest.raises(NotFound):
            datasets.get(session, file)


def test_a_deletion_names_the_file_that_a_run_has_collected(used):
    registry, file = used
    with registry.writing() as session:
        nightly.collect(session, nightly.open_run(session).id, "acme/support")
        assert completions.delete(session, completion(1).id, "acme", CHAT).files == (file,)
        assert datasets.get(session, file).id == file
        assert not any(each.for_example for each in use.lock_unused(session, "acme/support"))


def test_a_changed_correction_is_used_again_and_the_same_is_not(used):
    registry, _ = used
    with registry.writing() as session:
        nightly.collect(session, nightly.open_run(session).id, "acme/support")
        same = ratings.give(session, completion(1).id, "acme", correction="better", reason="a reason alone")
        assert same.example_used_at is not None
        changed = ratings.give(session, completion(1).id, "acme", correction="best")
        assert changed.example_used_at is None
        assert [each.correction for each in use.lock_unused(session, "acme/support") if each.for_example] == ["best"]
