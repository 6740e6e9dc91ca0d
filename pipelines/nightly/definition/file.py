"""nightly.yaml as a long-lived process sees it: it is read again when it changes, and the last good one is kept."""

from __future__ import annotations

import logging

from loramill.errors import DefinitionInvalid
from loramill.pipelines.nightly.definition.load import NO_FILE, load_definition
from loramill.pipelines.nightly.definition.schema import NightlyDefinition
from loramill.settings import Settings

log = logging.getLogger(__name__)


class DefinitionFile:
    """The file that the settings name."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._definition, self._seen = NO_FILE, ("", 0, 0)

    def read(self) -> NightlyDefinition:
        """Returns the definition; that of the last file without faults, where the present one has some."""
        path = self._settings.nightly_file
        try:
            found = path.stat()
            seen = (str(path), found.st_mtime_ns, found.st_size)
        except OSError:
            seen = ("", -1, 0)
        if seen != self._seen:
            self._seen = seen
            try:
                self._definition = load_definition(self._settings)
            except DefinitionInvalid as error:
                log.error("nightly runs continue with the definition before this change: %s", error.message)
        return self._definition
