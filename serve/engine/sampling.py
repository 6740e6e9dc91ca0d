"""From a row of logits to a token."""

from __future__ import annotations

import torch

from loramill.serve.engine.values import Sampling, TokenLogprobs

#: So many of the likeliest tokens nearly always hold the share that top_p asks for: a full sort costs ten times more.
_HEAD = 256

#: Below this temperature the likeliest token is taken: dividing by less leaves float32's range.
GREEDY_BELOW = 1e-5


def new_generator(sampling: Sampling) -> torch.Generator:
    """A request's own source of randomness: its tokens depend on nothing else in the batch."""
    generator = torch.Generator()
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed)
    return generator


def sample(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Chooses a token by temperature, then top_k, then top_p; one random number a token.

    Args:
        logits: [vocabulary] float32, finite.
        sampling: how.
        generator: the request's.
    """
    if sampling.temperature < GREEDY_BELOW:
        return int(logits.argmax())
    probabilities = ((logits - logits.max()) / sampling.temperature).softmax(-1)
    tokens = None
    if sampling.top_k or sampling.top_p < 1.0:
        probabilities, tokens = _likeliest(probabilities, sampling)
    steps = probabilities.double().cumsum(0)
    point = torch.rand(1, generator=generator, dtype=torch.float64) * steps[-1]
    choice = torch.searchsorted(steps, point, right=True).clamp_(max=len(steps) - 1)
    return int(choice if tokens is None else tokens[choice])


def logprobs_of(logits: torch.Tensor, token: int, top: int) -> TokenLogprobs:
    """The log probability of a token and of the `top` likeliest, from logits [vocabulary]."""
    logprobs = logits.log_softmax(-1)
    values, tokens = logprobs.topk(min(top, len(logprobs)))
    return TokenLogprobs(token, float(logprobs[token]), tuple(zip(tokens.tolist(), values.tolist(), strict=True)))


def _likeliest(probabilities: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    vocabulary = len(probabilities)
    limit = min(sampling.top_k or vocabulary, vocabulary)
    values, tokens = probabilities.topk(min(limit, _HEAD))
    if len(values) < limit and float(values.sum()) < sampling.top_p:
        values, tokens = probabilities.topk(limit)
    if sampling.top_k and len(values) == limit:
        values = values / values.sum()
    # A token is kept while those before it don't hold the share yet, so the first always is.
    kept = values.double().cumsum(0) - values < sampling.top_p
    kept[0] = True
    return values[kept], tokens[kept]
