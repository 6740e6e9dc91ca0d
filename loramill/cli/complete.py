"""Shell completion of names and ids from the gateway; empty if it does not answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice

from loramill.client import Client
from loramill.errors import LoramillError

#: How long to wait for the gateway, and how many of the newest jobs to offer.
_TIMEOUT_SECONDS, _MAX_JOBS = 2.0, 50


def adapters(incomplete: str) -> list[str]:
    """Returns the adapters whose names begin with `incomplete`."""
    return _matching(incomplete, lambda client: (each.name for each in client.adapters.list()))


def models(incomplete: str) -> list[str]:
    """Returns the bases and adapters whose names begin with `incomplete`."""
    return _matching(incomplete, lambda client: client.models())


def tenants(incomplete: str) -> list[str]:
    """Returns the tenants whose names begin with `incomplete`."""
    return _matching(incomplete, lambda client: (each.name for each in client.tenants.list()))


def jobs(incomplete: str) -> list[str]:
    """Returns the ids of the newest jobs that begin with `incomplete`."""
    return _matching(incomplete, lambda client: (each.id for each in islice(client.jobs.list(), _MAX_JOBS)))


def _matching(incomplete: str, names: Callable[[Client], Iterable[str]]) -> list[str]:
    try:
        with Client(timeout=_TIMEOUT_SECONDS) as client:
            return [name for name in names(client) if name.startswith(incomplete)]
    except LoramillError:  # a message would appear in the middle of the command line
        return []
