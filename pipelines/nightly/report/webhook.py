"""Sends the message about a nightly run to a webhook; a failure never fails the run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

#: Seconds for connecting, sending and each part of the response.
TIMEOUT_SECONDS = 10.0
#: Pauses between three attempts, in seconds.
PAUSES = (1.0, 4.0)
#: Statuses after which another attempt may succeed, in addition to all from 500.
_TRANSIENT = (408, 425, 429)


@dataclass(frozen=True, slots=True)
class Delivery:
    """Whether a message arrived; `problem` states why it did not."""

    problem: str | None = None


def send(
    url: str,
    message: Mapping[str, Any],
    *,
    sleep: Callable[[float], None] = time.sleep,
    timeout: float = TIMEOUT_SECONDS,
) -> Delivery:
    """Posts a message as JSON, at most three times; an answer that no retry changes ends the attempts.

    The URL of a webhook is a secret: problems name its host alone.
    """
    host = _host(url)
    problem = ""
    for pause in (*PAUSES, None):
        try:
            response = httpx.post(url, json=message, timeout=timeout)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            problem = f"{type(error).__name__}"
            transient = isinstance(error, httpx.TransportError) and not isinstance(error, httpx.UnsupportedProtocol)
        else:
            if response.is_success:
                return Delivery()
            problem = f"status {response.status_code}"
            transient = response.status_code >= 500 or response.status_code in _TRANSIENT
        if not transient or pause is None:
            break
        sleep(pause)
    return Delivery(
        f"The webhook at {host} did not take the message ({problem}); check notify.webhook of nightly.yaml."
    )


def _host(url: str) -> str:
    try:
        return urlsplit(url).hostname or "an unknown host"
    except ValueError:
        return "an unknown host"
