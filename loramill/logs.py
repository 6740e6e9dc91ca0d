"""Logging of loramill's processes to standard error, in one format.

`configure` is called by processes that loramill starts (cluster, replicas, sessions), never by library code.
"""

from __future__ import annotations

import logging

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"

#: Loggers of libraries that log on import, and the minimum level of the messages that are kept.
_LIBRARIES = {
    "alembic": logging.WARNING,  # "setup plugin …", seven lines per process that opens the registry
    "bitsandbytes.backends.cpu.ops": logging.ERROR,  # an optional kernel that is missing
}


def configure() -> None:
    """Logs loramill's messages from INFO and libraries' messages from WARNING to standard error."""
    root = logging.getLogger()
    bare = [each for each in root.handlers if isinstance(each, logging.StreamHandler) and each.formatter is None]
    for handler in bare:  # Ray Train's in a session, which writes only the message
        root.removeHandler(handler)
    if bare or not root.handlers:
        ours = logging.StreamHandler()
        ours.setFormatter(logging.Formatter(FORMAT))
        root.addHandler(ours)
    logging.getLogger("loramill").setLevel(logging.INFO)
    quiet_libraries()


def quiet_libraries() -> None:
    """Suppresses what libraries log on import."""
    for name, level in _LIBRARIES.items():
        logging.getLogger(name).setLevel(level)
