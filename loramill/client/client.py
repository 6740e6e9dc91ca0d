"""`loramill.Client`: the gateway from Python."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from datetime import date
from itertools import chain, islice
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from loramill.client.adapters import AdaptersResource
from loramill.client.feedback import FeedbackResource
from loramill.client.files import FilesResource
from loramill.client.http import Transport, is_local_url, unexpected_response
from loramill.client.jobs import JobsResource
from loramill.client.models import parse_object
from loramill.client.tenants import KeysResource, TenantsResource
from loramill.errors import Overloaded, SettingsInvalid, Unauthenticated, Unavailable
from loramill.retry import retry_while_unavailable
from loramill.settings import Settings
from loramill.submission.options import drop_none
from loramill.types import AuditRecord, UsageRecord

if TYPE_CHECKING:
    import openai

#: A conversation, such as `[{"role": "user", "content": "Hello"}]`, or the text of one user message.
Messages = str | Iterable[Mapping[str, str]]

T = TypeVar("T")

_CHAT = "/v1/chat/completions"
#: How long a generation is retried that a busy gateway refuses.
_RETRY_SECONDS = 4.0


class Client:
    """A gateway, for one tenant or for an admin.

        with loramill.Client() as client:
            job = client.jobs.submit("acme/support", "train.jsonl", valid="valid.jsonl", epochs=3)
            client.jobs.wait(job.id)
            print(client.chat("acme/support", "Where is my parcel?"))

    A tenant's key acts for its tenant. An admin's key acts for `organization`, and for the tenant in an adapter's name
    where there is one.

    Every method raises errors of `loramill.errors`: NotRunning and Unavailable if no gateway answers, Unauthenticated
    and Forbidden if the key is not accepted, otherwise the error that the gateway reports.

    Args:
        url: Address of the gateway. Default: that of the settings (this machine's, unless LORAMILL_URL is set).
        api_key: Default: LORAMILL_API_KEY or, on this machine, the admin key that `loramill up` created.
        organization: Tenant that an admin's key acts for.
        timeout: Maximum time to wait for one response, in seconds.

    Attributes:
        jobs: Fine-tune jobs.
        files: Uploaded datasets.
        adapters: Adapters, their versions and aliases.
        tenants: Tenants and their limits.
        keys: API keys of tenants.
        feedback: Ratings and corrections of stored completions.
    """

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        organization: str | None = None,
        *,
        timeout: float = 120.0,
    ) -> None:
        if not (url and api_key):
            settings = Settings.load()
            url = url or settings.gateway
            api_key = api_key or _default_api_key(settings, url)
        self.url = url.rstrip("/").removesuffix("/v1")
        self._api_key = api_key
        self._organization = organization
        if api_key and not (api_key.isascii() and api_key.isprintable()):
            raise SettingsInvalid("The API key contains invalid characters; correct LORAMILL_API_KEY.")
        self._transport = Transport(self.url, api_key, organization, timeout)
        self.files = FilesResource(self._transport)
        self.jobs = JobsResource(self._transport, self.files)
        self.adapters = AdaptersResource(self._transport, self.files)
        self.tenants = TenantsResource(self._transport)
        self.keys = KeysResource(self._transport)
        self.feedback = FeedbackResource(self._transport)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections."""
        self._transport.close()

    def is_ready(self) -> bool:
        """Whether the gateway is up and its models answer."""
        return self._transport.succeeds("/readyz")

    def models(self) -> Sequence[str]:
        """Returns the names that `chat` accepts: the base, and each adapter that the key may use."""
        return [str(model["id"]) for model in self._transport.paginate("/v1/models")]

    def chat(self, model: str, messages: Messages, **parameters: Any) -> str:
        """Returns the model's answer.

        Args:
            model: A base, `tenant/adapter`, or `tenant/adapter@version`.
            messages: The conversation so far, or the text of one user message.
            parameters: OpenAI's: max_tokens, temperature, seed, …
        """
        request = _chat_request(model, messages, parameters)
        response = _retry(lambda: self._transport.request_json("POST", _CHAT, json=request))
        try:
            return response["choices"][0]["message"]["content"] or ""
        except (KeyError, IndexError) as error:
            raise unexpected_response(self.url, "its response is not a chat completion") from error

    def stream(self, model: str, messages: Messages, **parameters: Any) -> Generator[str, None, None]:
        """Yields the model's answer in pieces as it is generated. The arguments are those of `chat`."""
        request = {**_chat_request(model, messages, parameters), "stream": True}

        def start() -> tuple[Any, Iterator[Any]]:
            events = self._transport.stream_events(_CHAT, request)
            return next(events, {}), events

        first, events = _retry(start)
        for chunk in chain([first], events):
            if (choices := chunk.get("choices")) and (text := choices[0]["delta"].get("content")):
                yield text

    def openai(self) -> openai.OpenAI:
        """Returns an `openai` client of this gateway, for everything in OpenAI's API beyond `chat`.

        It needs the package `openai`: `pip install loramill[openai]`.
        """
        from openai import DefaultHttpxClient, OpenAI

        if self._api_key is None:
            raise Unauthenticated("There is no API key: set LORAMILL_API_KEY, or pass Client(api_key=…).")
        return OpenAI(
            base_url=f"{self.url}/v1",
            api_key=self._api_key,
            organization=self._organization,
            http_client=DefaultHttpxClient(trust_env=not is_local_url(self.url)),
        )

    def usage(
        self, tenant: str | None = None, *, first: date | None = None, last: date | None = None
    ) -> Sequence[UsageRecord]:
        """Returns requests and tokens per day (UTC) and base or version, the newest day first.

        Args:
            tenant: Default: the API key's own; for an admin's key, all tenants.
            first: First day. Default: 30 days ago.
            last: Last day. Default: today.
        """
        query = {"tenant": tenant, "from": first and first.isoformat(), "to": last and last.isoformat()}
        rows = self._transport.request_json("GET", "/v1/usage", params=drop_none(query))["data"]
        return [parse_object(UsageRecord, row) for row in rows]

    def audit(self, tenant: str | None = None, *, limit: int = 100) -> Sequence[AuditRecord]:
        """Returns changes that were made through the API, newest first.

        Args:
            tenant: Tenant whose objects were changed. Default: the API key's own; for an admin's key, all tenants.
            limit: Maximum number of changes.
        """
        rows = self._transport.paginate("/v1/audit", limit=min(limit, 100), query=drop_none({"tenant": tenant}))
        return [parse_object(AuditRecord, row) for row in islice(rows, limit)]


def _retry(operation: Callable[[], T]) -> T:
    """Retries a generation that the gateway refused because it is busy; it has not begun."""
    errors = (Overloaded, Unavailable)
    return retry_while_unavailable(operation, timeout_seconds=_RETRY_SECONDS, pause_seconds=1.0, errors=errors)


def _default_api_key(settings: Settings, url: str) -> str | None:
    """The key of the settings, or this machine's admin key, which is sent to no other machine."""
    if settings.api_key:
        return settings.api_key
    if not is_local_url(url) or not settings.admin_key_file.exists():
        return None
    try:
        return settings.admin_key_file.read_text().strip()
    except OSError as error:
        raise Unauthenticated(f"The admin key in {settings.admin_key_file} can't be read: {error.strerror}.") from error


def _chat_request(model: str, messages: Messages, parameters: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    return {"model": model, "messages": [dict(message) for message in messages], **parameters}
