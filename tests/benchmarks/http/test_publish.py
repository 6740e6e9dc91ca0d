"""The adapters that are requested, in their registry."""

from __future__ import annotations

from pathlib import Path

from loramill.models.catalog import Base
from loramill.names import AdapterName
from loramill.registry import Registry, adapters
from loramill.settings import Settings
from loramill_bench.http import publish


def test_adapters_are_in_the_registry_each_of_its_own_tenant(published, settings: Settings) -> None:
    registry = Registry.open(settings.database, settings.artifacts)
    with registry.reading() as session:
        records = adapters.list_adapters(session, None)
        assert [record.name for record in records] == list(published.folders) == list(published.versions)
        for record in records:
            assert AdapterName.parse(record.name).tenant == record.tenant
            assert record.champion == published.versions[record.name][0]
            assert registry.artifacts.fetch(record.champion) == published.folders[record.name]
            others = {version.id for version in adapters.list_versions(session, record.name)}
            assert others == set(published.versions[record.name])
    assert len({record.champion for record in records}) == 6
    assert [len(versions) for versions in published.versions.values()] == [2] * 2 + [1] * 4
    assert all(len(set(versions)) == len(versions) for versions in published.versions.values())
    assert {folder.parent for folder in published.folders.values()} != {settings.home / "drawn"}
    assert not (settings.home / "drawn").exists()


def test_the_same_seed_makes_the_same_adapters(
    published, tiny: Base, settings: Settings, few_adapters: None, tmp_path: Path
) -> None:
    def versions(seed: int, home: Path) -> object:
        home.mkdir()
        return publish.publish(settings.model_copy(update={"home": home}), tiny, seed).versions

    assert versions(3, tmp_path / "again") == published.versions
    assert versions(4, tmp_path / "other") != published.versions
