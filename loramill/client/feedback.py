"""`client.feedback`: ratings and corrections of stored completions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING
from urllib.parse import quote

from loramill.client.models import RatedAnswer, parse_object
from loramill.submission.options import drop_none
from loramill.types import CompletionDeletion, FeedbackRecord, Rating

if TYPE_CHECKING:
    from loramill.client.http import Transport

_PATH = "/v1/feedback"


class FeedbackResource:
    """Feedback on completions that were requested with `store: true`."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def give(
        self,
        completion_id: str,
        *,
        rating: Rating | str | None = None,
        correction: str | None = None,
        reason: str | None = None,
        choice: int = 0,
    ) -> FeedbackRecord:
        """Rates an answer, or gives the answer as it should have been; the latest call counts.

        Args:
            completion_id: The `id` of the response.
            rating: "good" or "bad".
            correction: The right answer, which nightly runs train on.
            reason: Why; it is kept, and not trained on.
            choice: Index of the answer among the choices.

        Raises:
            NotFound: The completion is not stored.
        """
        given = {"completion_id": completion_id, "rating": rating, "correction": correction, "reason": reason}
        body = drop_none(given) | {"choice": choice}
        return parse_object(FeedbackRecord, self._transport.request_json("POST", _PATH, json=body))

    def list(
        self,
        *,
        adapter: str | None = None,
        user: str | None = None,
        texts: bool = False,
        limit: int | None = None,
        tenant: str | None = None,
    ) -> Sequence[RatedAnswer]:
        """Returns feedback, newest first.

        Args:
            adapter: Only on answers of this `tenant/adapter`.
            user: Only on answers to this user.
            texts: Include requests and answers.
            limit: Maximum number. Default: all.
            tenant: Only of this tenant (for an admin's key).
        """
        query = drop_none({"adapter": adapter, "user": user, "texts": "true" if texts else None})
        rows = self._transport.paginate(_PATH, query=query, tenant=tenant)
        return [parse_object(RatedAnswer, row) for row in islice(rows, limit)]

    def delete(self, completion_id: str) -> CompletionDeletion:
        """Deletes the feedback on a completion, which itself stays stored."""
        path = f"{_PATH}/{quote(completion_id, safe='')}"
        return parse_object(CompletionDeletion, self._transport.request_json("DELETE", path))

    def delete_user(self, user: str, *, tenant: str | None = None) -> CompletionDeletion:
        """Deletes all stored completions of a user, with their feedback.

        Args:
            user: The `user` of the requests.
            tenant: The user's tenant (for an admin's key).
        """
        response = self._transport.request_json("DELETE", _PATH, params={"user": user}, tenant=tenant)
        return parse_object(CompletionDeletion, response)
