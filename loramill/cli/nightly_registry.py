"""The registry that the commands of `loramill nightly` open on its own machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loramill.registry import Registry
    from loramill.settings import Settings


def open_registry() -> tuple[Settings, Registry]:
    """Returns the settings of the pool, and the registry."""
    from loramill.local.gpus import settings_of_pool
    from loramill.registry import Registry
    from loramill.settings import Settings

    settings = settings_of_pool(Settings.load())
    return settings, Registry.open(settings.database, settings.artifacts)
