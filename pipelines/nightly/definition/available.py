"""Keys of nightly.yaml that runs do not use yet: setting one is a fault, so that none is silently ignored."""

from __future__ import annotations

from loramill.pipelines.nightly.definition.schema import NightlyDefinition

#: Sections and keys.
UNAVAILABLE = (("split", "by"),)


def unavailable_keys(definition: NightlyDefinition) -> list[tuple[str | int, ...]]:
    """The paths of the keys that a definition sets and runs do not use."""
    places = [((), definition), *((("overrides", index), each) for index, each in enumerate(definition.overrides))]
    return [
        (*path, section, key)
        for path, sections in places
        for section, key in UNAVAILABLE
        if (values := getattr(sections, section)) is not None and key in values.model_fields_set
    ]
