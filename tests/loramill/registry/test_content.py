"""What is recorded of the content of adapters; on both databases."""

from loramill.names import AdapterName
from loramill.registry import adapters, content, datasets, deletion, nightly, renaming, tenants
from loramill.types import ContentSide

NAME, OTHER = AdapterName("acme", "support"), AdapterName("acme", "sales")
HELD, TRAIN = ContentSide.HELD_OUT, ContentSide.TRAIN


def start(session) -> str:
    tenants.create(session, "acme")
    for name in (NAME, OTHER):
        adapters.get_or_create(session, name)
    return nightly.open_run(session).id


def sides(session, name=NAME) -> dict[str, tuple[ContentSide, bool]]:
    return {each.digest: (each.side, each.used) for each in content.list_content(session, name)}


def test_content_is_recorded_per_adapter_and_released_by_run(registry):
    with registry.writing() as session:
        run = start(session)
        content.record(session, NAME, TRAIN, [("b", b"12"), ("a", b"")], dataset="file-1", run=run)
        content.record(session, NAME, HELD, [("c", b"34")], dataset="file-2", run=run)
        content.record(session, OTHER, HELD, [("a", b"")], dataset="file-2", run=None)
        assert list(sides(session)) == ["a", "b", "c"]
        assert sides(session) == {"a": (TRAIN, True), "b": (TRAIN, True), "c": (HELD, True)}
        content.release(session, run, NAME)
        assert sides(session) == {"a": (TRAIN, False), "b": (TRAIN, False), "c": (HELD, False)}
        content.release(session, run, OTHER)
        assert sides(session, OTHER) == {"a": (HELD, True)}, "what was imported from a champion's job stays used"
        content.record(session, NAME, HELD, [("a", b"5")], dataset="file-3", run=run)
        assert sides(session)["a"] == (HELD, True)
        assert [each.digest for each in content.list_content(session, NAME, HELD)] == ["a", "c"]
        assert [each.digest for each in content.list_content(session, NAME, TRAIN)] == ["b"]


def test_deleting_a_dataset_leaves_only_digests(registry):
    with registry.writing() as session:
        run = start(session)
        file = datasets.create(session, "acme", "x.jsonl", "a" * 64, 1, 1).id
        content.record(session, NAME, HELD, [("a", b"12")], dataset="file-1", run=run)
        content.record(session, NAME, HELD, [("b", b"34")], dataset="file-2", run=run)
        assert content.is_recorded(session, NAME, "file-1") and not content.is_recorded(session, OTHER, "file-1")
        content.move(session, NAME, "file-1", file)
        assert not content.is_recorded(session, NAME, "file-1")
        datasets.delete(session, file)
        assert {each.digest: each.sketch for each in content.list_content(session, NAME)} == {"a": b"", "b": b"34"}


def test_content_follows_a_renamed_adapter_and_goes_with_a_deleted_one(registry):
    with registry.writing() as session:
        run = start(session)
        for name in (NAME, OTHER):
            content.record(session, name, HELD, [("a", b"12")], dataset="file-1", run=run)
        nightly.finish_run(session, run)
        renamed = AdapterName("acme", "help")
        renaming.rename(session, NAME, renamed)
        assert sides(session, renamed) == {"a": (HELD, True)} and sides(session, NAME) == {}
        deletion.delete_adapter(session, renamed)
        assert sides(session, renamed) == {} and sides(session, OTHER) == {"a": (HELD, True)}
        deletion.delete_tenant(session, "acme")
        assert sides(session, OTHER) == {}
