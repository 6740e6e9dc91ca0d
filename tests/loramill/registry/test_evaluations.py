"""Results per example: stored, referenced by evaluations, and removed with the last of them; on both databases."""

from __future__ import annotations

import pytest

from loramill.errors import ArtifactMissing
from loramill.names import AdapterName
from loramill.registry import Registry, adapters, deletion, evaluations, renaming, tenants
from loramill.types import ExampleResult, VersionRecord

NAME = AdapterName("acme", "support")
RESULTS = [
    ExampleResult(
        example="e" * 64,
        candidate=candidate,
        version=version,
        scores={"exact_match": 1.0, "token_f1": 1 / 3},
        answer="in Rome\u2028\nor \U0001f600",
        truncated=True,
        slices=("new", "new: it"),
    )
    for candidate, version in (("base", None), ("challenger", "a" * 64))
]


def evaluated(registry: Registry, *, adapter: AdapterName = NAME) -> str:
    """Evaluations of a version and the base that refer to their results; returns the artifact."""
    artifact = evaluations.store_results(registry.artifacts, RESULTS)
    with registry.writing() as session:
        tenants.create(session, adapter.tenant)
        adapters.get_or_create(session, adapter)
        record = VersionRecord(id="a" * 64, adapter=str(adapter), job=None, base="b" * 64, bytes=1, created_at=1.0)
        adapters.add_version(session, record)
        for version in (None, record.id):
            evaluations.add(session, adapter, version, "file-1", "new", 1, {"token_f1": 1 / 3}, artifact)
    return artifact


def kept(registry: Registry, artifact: str) -> bool:
    registry.remove_unreferenced(older_than=-1)
    try:
        return evaluations.read_results(registry.artifacts, artifact) == RESULTS
    except ArtifactMissing:
        return False


def test_results_are_read_as_they_were_stored(registry: Registry) -> None:
    artifact = evaluated(registry)
    assert evaluations.store_results(registry.artifacts, RESULTS) == artifact
    with registry.reading() as session:
        assert {each.results for each in evaluations.list_evaluations(session, NAME)} == {artifact}
    assert kept(registry, artifact)


@pytest.mark.parametrize("subject", ["adapter", "tenant"])
def test_results_are_removed_with_their_adapter_or_tenant(registry: Registry, subject: str) -> None:
    artifact = evaluated(registry)
    with registry.writing() as session:
        renaming.rename(session, NAME, AdapterName("acme", "help"))
    assert kept(registry, artifact)
    with registry.writing() as session:
        if subject == "adapter":
            deletion.delete_adapter(session, "acme/help")
        else:
            deletion.delete_tenant(session, "acme")
    assert not kept(registry, artifact)


def test_results_that_another_evaluation_refers_to_are_kept(registry: Registry) -> None:
    artifact = evaluated(registry)
    assert evaluated(registry, adapter=AdapterName("globex", "bot")) == artifact
    with registry.writing() as session:
        deletion.delete_adapter(session, NAME)
    assert kept(registry, artifact)
    with registry.writing() as session:
        deletion.delete_tenant(session, "globex")
    assert not kept(registry, artifact)


def test_results_that_no_evaluation_refers_to_are_removed(registry: Registry) -> None:
    assert not kept(registry, evaluations.store_results(registry.artifacts, RESULTS))
