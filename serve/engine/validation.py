"""Validates a request and computes how long its answer may get."""

from __future__ import annotations

import math

from loramill.errors import ContextLengthExceeded, InvalidRequest
from loramill.serve.engine.types import Request
from loramill.serve.sampling_params import SamplingParams

MAX_LOGPROBS = 20
MAX_ANSWERS = 128


def answer_limit(request: Request, *, vocabulary: int, context_length: int, kv_tokens: int) -> int:
    """Validates a request and returns how many tokens each of its answers may have.

    That is `max_tokens`, capped to what the base's context and the KV cache hold in addition to the prompt.

    Raises:
        ContextLengthExceeded: The prompt leaves no room for an answer.
        InvalidRequest: A field is invalid.
    """
    _check_sampling(request.sampling_params)
    for token, bias in request.sampling_params.logit_bias:
        if not 0 <= token < vocabulary or math.isnan(bias) or bias == math.inf:
            raise InvalidRequest(
                f"logit_bias adds {bias} to token {token}; use tokens 0 to {vocabulary - 1} and less than infinity.",
                param="logit_bias",
            )
    if request.timeout_seconds is not None and not request.timeout_seconds > 0:
        raise InvalidRequest(f"timeout is {request.timeout_seconds}; it must be more than 0 seconds.", param="timeout")
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
    # The last token of an answer is never read again, so it needs no room in the cache.
    available = min(context_length - prompt, kv_tokens + 1 - prompt)
    max_tokens = request.sampling_params.max_tokens
    return available if max_tokens is None else min(max_tokens, available)


def _check_sampling(s: SamplingParams) -> None:
    checks = [
        ("max_tokens", s.max_tokens is None or s.max_tokens >= (0 if s.echo else 1), "at least 1, or 0 with echo"),
        ("temperature", 0.0 <= s.temperature < math.inf, "0 or more"),
        ("top_p", 0.0 < s.top_p <= 1.0, "above 0 and at most 1"),
        ("top_k", s.top_k >= 0, "0 (all) or more"),
        ("min_p", 0.0 <= s.min_p <= 1.0, "0 to 1"),
        ("repetition_penalty", 0.0 < s.repetition_penalty < math.inf, "above 0"),
        ("presence_penalty", math.isfinite(s.presence_penalty), "a finite number"),
        ("frequency_penalty", math.isfinite(s.frequency_penalty), "a finite number"),
        ("min_tokens", 0 <= s.min_tokens <= (math.inf if s.max_tokens is None else s.max_tokens), "0 to max_tokens"),
        ("n", 1 <= s.n <= MAX_ANSWERS, f"1 to {MAX_ANSWERS}"),
        ("seed", s.seed is None or -(2**63) <= s.seed < 2**63, "a 64-bit integer"),
        ("logprobs", s.logprobs is None or 0 <= s.logprobs <= MAX_LOGPROBS, f"0 to {MAX_LOGPROBS}"),
    ]
    for name, good, rule in checks:
        if not good:
            raise InvalidRequest(f"{name} is {getattr(s, name)}; it must be {rule}.", param=name)
