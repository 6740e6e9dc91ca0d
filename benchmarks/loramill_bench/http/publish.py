"""Publishes random adapters in a new registry, as if their tenants had trained them."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from loramill.models.catalog import Base
from loramill.names import AdapterName
from loramill.registry import Registry, adapters, migrate, tenants
from loramill.serve.model import load_decoder
from loramill.settings import Settings
from loramill.types import VersionRecord
from loramill_bench.engine.harness import write_adapters
from loramill_bench.http.workload import ADAPTERS, DISTINCT


@dataclass(frozen=True, slots=True)
class PublishedAdapters:
    """Adapters by name, the most requested first; each belongs to a tenant of its own.

    Attributes:
        folders: PEFT folder of each adapter's champion.
        versions: Versions of each adapter, the champion first. The first `DISTINCT` adapters have two.
    """

    folders: Mapping[str, Path]
    versions: Mapping[str, tuple[str, ...]]


def publish(settings: Settings, base: Base, seed: int) -> PublishedAdapters:
    """Creates the registry of the settings, which must not exist yet, with adapters of rank 16 at all linears."""
    migrate(settings.database)
    registry = Registry.open(settings.database, settings.artifacts)
    scratch = settings.home / "drawn"
    scratch.mkdir()
    torch.manual_seed(seed)
    folders = write_adapters(load_decoder(base.folder, dtype=torch.bfloat16, threads=1), scratch, ADAPTERS)
    stored = [registry.artifacts.put({file.name: file for file in folder.iterdir()}) for folder in folders]
    shutil.rmtree(scratch)
    names = [f"tenant{number:02d}/random" for number in range(ADAPTERS)]
    # The second version of an adapter is another tenant's first one: it only has to differ.
    versions = {
        name: (stored[number], *([stored[number + DISTINCT]] if number < DISTINCT else []))
        for number, name in enumerate(names)
    }
    with registry.writing() as session:
        for name, ids in versions.items():
            tenants.create(session, AdapterName.parse(name).tenant)
            adapters.get_or_create(session, AdapterName.parse(name))
            for version in ids:
                size = registry.artifacts.size(version)
                record = VersionRecord(
                    id=version, adapter=name, job=None, base=base.fingerprint, bytes=size, created_at=time.time()
                )
                adapters.add_version(session, record)
    champions = {name: registry.artifacts.fetch(ids[0]) for name, ids in versions.items()}
    registry.close()
    return PublishedAdapters(champions, versions)
