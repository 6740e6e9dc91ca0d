"""Keys of nightly.yaml that runs do not use yet: setting one is a fault, so that none is silently ignored."""

from __future__ import annotations

from collections.abc import Iterator

from loramill.pipelines.nightly.definition.schema import AdapterDefinition, NightlyDefinition, OverrideDefinition

#: By section; None stands for all keys.
UNAVAILABLE: dict[str, tuple[str, ...] | None] = {
    "split": ("by",),
    "gate": ("approval",),
}


def unavailable_keys(definition: NightlyDefinition) -> list[str]:
    """The names of the keys that a definition sets and runs do not use."""
    found = list(_keys_of(definition, ""))
    for index, override in enumerate(definition.overrides):
        found += _keys_of(override, f"overrides.{index}.")
    return found


def is_available(section: str, key: str) -> bool:
    """Whether runs use a key."""
    keys = UNAVAILABLE.get(section, ())
    return keys is not None and key not in keys


def _keys_of(sections: NightlyDefinition | OverrideDefinition, prefix: str) -> Iterator[str]:
    for name in AdapterDefinition.model_fields:
        section = getattr(sections, name)
        for key in () if section is None else sorted(section.model_fields_set):
            if not is_available(name, key):
                yield f"{prefix}{name}.{key}"
