"""What every generation passes between its lookup and the backend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from loramill.serve.api.answers import Chunks, generate
from loramill.serve.api.auth import Caller
from loramill.serve.api.gateway import Gateway
from loramill.serve.api.lookup import Target
from loramill.serve.protocol import TextRequest


async def admit(
    here: Gateway, who: Caller, target: Target, requests: Sequence[TextRequest]
) -> tuple[Chunks, Mapping[str, str]]:
    """Begins to generate all answers of one call; returns their chunks and the response's headers.

    Raises:
        LoramillError: of the first answer that fails, from the chunks; the others are cancelled.
    """
    return generate(target.served.backend, requests), target.headers
