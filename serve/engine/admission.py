"""Whether a request can be served at all, and how long its answer may get."""

from __future__ import annotations

import math

from loramill.errors import ContextLengthExceeded, InvalidRequest
from loramill.serve.engine.values import Request, Sampling

MAX_LOGPROBS = 20


def answer_limit(request: Request, *, vocabulary: int, context_length: int, kv_tokens: int) -> int:
    """Checks a request and returns how many tokens its answer may have.

    That is `max_tokens`, capped to what the base's context and the KV cache hold beside the prompt.

    Raises:
        ContextLengthExceeded: the prompt leaves no room for an answer.
        InvalidRequest: a field makes no sense.
    """
    _check_sampling(request.sampling)
    prompt = len(request.tokens)
    if not prompt:
        raise InvalidRequest("The prompt is empty; it needs at least one token.", param="prompt")
    if min(request.tokens) < 0 or max(request.tokens) >= vocabulary:
        raise InvalidRequest(f"The prompt holds a token outside the base's vocabulary of {vocabulary}.", param="prompt")
    if prompt >= context_length:
        raise ContextLengthExceeded(
            f"The prompt has {prompt} tokens; the base's context holds {context_length} with the answer. Shorten it.",
            param="prompt",
        )
    if prompt > kv_tokens:
        raise ContextLengthExceeded(
            f"The prompt has {prompt} tokens; this engine's KV cache holds {kv_tokens}. Shorten it, or have the "
            "server's kv_tokens raised.",
            param="prompt",
        )
    # The last token of an answer is never read again, so it takes no room in the cache.
    return min(request.sampling.max_tokens, context_length - prompt, kv_tokens + 1 - prompt)


def _check_sampling(s: Sampling) -> None:
    checks = [
        ("max_tokens", s.max_tokens >= 1, "at least 1"),
        ("temperature", 0.0 <= s.temperature < math.inf, "0 or more"),
        ("top_p", 0.0 < s.top_p <= 1.0, "above 0 and at most 1"),
        ("top_k", s.top_k >= 0, "0 (all) or more"),
        ("seed", s.seed is None or -(2**63) <= s.seed < 2**63, "a 64-bit integer"),
        ("logprobs", s.logprobs is None or 0 <= s.logprobs <= MAX_LOGPROBS, f"0 to {MAX_LOGPROBS}"),
    ]
    for name, good, rule in checks:
        if not good:
            raise InvalidRequest(f"{name} is {getattr(s, name)}; it must be {rule}.", param=name)
