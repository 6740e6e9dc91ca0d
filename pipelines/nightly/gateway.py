"""The gateway for a nightly run: whether it answers, and answers to questions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from openai import AsyncOpenAI, DefaultAsyncHttpxClient

from loramill.client import Client
from loramill.client.http import is_local_url, translate_openai_errors
from loramill.errors import LoramillError, SettingsInvalid, Unavailable
from loramill.pipelines.nightly.questions import EvalAnswer, EvalQuestion, Keep, answer_all
from loramill.settings import Settings


class EvalGateway(Protocol):
    """What a nightly run needs of a gateway."""

    def check(self) -> None:
        """Raises NotRunning if nothing answers, and Unavailable if the models do not answer yet."""

    def answer_all(
        self,
        questions: Sequence[EvalQuestion],
        report: Callable[[int], None],
        keep: Keep = lambda index, answer: None,
    ) -> list[EvalAnswer | LoramillError]:
        """Returns the greedy answers, or errors in their place.

        Args:
            report: called with the number of finished questions.
            keep: called with each answer and its question's index as soon as it is there.

        Raises:
            NotRunning, Unavailable: the gateway does not answer any more.
        """
        ...


class HttpGateway:
    """The gateway that the settings name, with the admin's key."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def check(self) -> None:
        """See `EvalGateway`."""
        with Client(self._settings.gateway, self._key()) as client:
            if not client.is_ready():
                client.models()  # raises NotRunning where nothing listens
                raise Unavailable(f"The models of the gateway at {client.url} do not answer yet; try again.")

    def answer_all(
        self,
        questions: Sequence[EvalQuestion],
        report: Callable[[int], None],
        keep: Keep = lambda index, answer: None,
    ) -> list[EvalAnswer | LoramillError]:
        """See `EvalGateway`."""
        url = self._settings.gateway
        with translate_openai_errors(url):
            return answer_all(openai_client(url, self._key()), questions, report=report, keep=keep)

    def _key(self) -> str:
        file = self._settings.admin_key_file
        if not self._settings.api_key and not file.is_file():
            raise SettingsInvalid(
                f"There is no API key: set LORAMILL_API_KEY, or run this on the machine that has {file}."
            )
        return self._settings.api_key or file.read_text().strip()


def openai_client(url: str, key: str) -> AsyncOpenAI:
    """A client of the gateway at `url`; a gateway on this machine is reached without a proxy."""
    http = DefaultAsyncHttpxClient(trust_env=not is_local_url(url))
    return AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=8, timeout=600, http_client=http)
