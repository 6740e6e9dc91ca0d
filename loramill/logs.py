"""Logging of loramill's processes: one format, on standard error.

`configure` is for processes that loramill starts (the cluster's, replicas, sessions); a library never calls it.
"""

from __future__ import annotations

import logging

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"

#: Loggers of libraries that log on import, and the level from which on they are kept.
_LIBRARIES = {
    "alembic": logging.WARNING,  # "setup plugin …", seven lines for each process that opens the registry
    "bitsandbytes.backends.cpu.ops": logging.ERROR,  # an optional kernel that is missing
}


def configure() -> None:
    """Sends loramill's own log from INFO on, and the warnings of libraries, to standard error."""
    root = logging.getLogger()
    bare = [each for each in root.handlers if isinstance(each, logging.StreamHandler) and each.formatter is None]
    for handler in bare:  # Ray Train's, in a session, which writes nothing but the message
        root.removeHandler(handler)
    if bare or not root.handlers:
        ours = logging.StreamHandler()
        ours.setFormatter(logging.Formatter(FORMAT))
        root.addHandler(ours)
    logging.getLogger("loramill").setLevel(logging.INFO)
    quiet_libraries()


def quiet_libraries() -> None:
    """Keeps what libraries log on import out of the log and off the terminal."""
    for name, level in _LIBRARIES.items():
        logging.getLogger(name).setLevel(level)
