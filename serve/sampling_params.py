"""How the tokens of one answer are sampled: by the gateway, the replica and the engine alike."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Penalties and bias change the logits; then temperature, top_k, top_p and min_p select among the tokens.

    Attributes:
        max_tokens: maximum number of tokens, capped to what fits the context; None: as many as fit. 0 needs `echo`.
        temperature: 0 always selects the most probable token.
        top_p: sample from the most probable tokens that together have this probability.
        top_k: sample from this many of the most probable tokens; 0: from all.
        min_p: sample from tokens at least this fraction as probable as the most probable one.
        repetition_penalty: divides positive logits, and multiplies negative ones, of tokens in the prompt or the answer
            (Keskar et al. 2019, section 4.1).
        presence_penalty: subtracted from the logits of tokens in the answer.
        frequency_penalty: the same, once per occurrence of the token in the answer.
        logit_bias: pairs of a token and what is added to its logit.
        seed: the same seed gives the same tokens, on a CPU in any batch; None: different ones each time.
        stop_ids: tokens that end the answer; they are not part of it.
        min_tokens: number of tokens before which no stop token is sampled.
        n: number of answers to the prompt; answer i has the seed plus i.
        logprobs: report each token's log probability and those of this many most probable tokens (0 to 20); None: no
            log probabilities.
        echo: the answer begins with the prompt.
    """

    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    stop_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    n: int = 1
    logprobs: int | None = None
    echo: bool = False
