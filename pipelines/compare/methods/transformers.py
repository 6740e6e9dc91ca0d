"""Greedy generation by transformers, for methods that the engine does not serve."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import Cache, DynamicCache, PreTrainedModel

#: Sequences per batch.
BATCH = 16

MakeCache = Callable[[int], Cache]


def empty_cache(rows: int) -> Cache:
    """An empty cache."""
    return DynamicCache()


@torch.inference_mode()
def greedy(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    stop_ids: Sequence[int],
    *,
    cache: MakeCache = empty_cache,
    report: Callable[[int], None] = lambda done: None,
) -> list[list[int]]:
    """Generates greedily, until a stop token (which is omitted) or the prompt's limit.

    Args:
        model: in eval mode.
        prompts: at least one token each.
        limits: maximum number of tokens per answer, at least 1.
        stop_ids: tokens that end an answer.
        cache: makes a cache for a number of sequences; all tokens attend to what it contains already.
        report: called with the number of complete answers.
    """
    answers: dict[int, list[int]] = {}
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(order), BATCH):
        group = order[start : start + BATCH]
        decoded = _decode(
            model,
            [prompts[index] for index in group],
            [limits[index] for index in group],
            frozenset(stop_ids),
            cache(len(group)),
        )
        answers |= dict(zip(group, decoded, strict=True))
        report(len(answers))
    return [answers[index] for index in range(len(prompts))]


def _decode(
    model: PreTrainedModel, prompts: list[Sequence[int]], limits: list[int], stop_ids: frozenset[int], cache: Cache
) -> list[list[int]]:
    """Generates a batch, padded on the left so that all answers continue at the same position."""
    width, before = max(map(len, prompts)), cache.get_seq_length()
    tokens = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=model.device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    seen = (torch.arange(width, device=model.device) >= width - lengths[:, None]).long()
    seen = torch.cat([seen.new_ones(len(prompts), before), seen], dim=1)
    positions = (seen.cumsum(dim=1) - 1).clamp(min=0)[:, before:]
    answers: list[list[int]] = [[] for _ in prompts]
    running = set(range(len(prompts)))
    while True:
        output = model(
            input_ids=tokens,
            attention_mask=seen,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        tokens = output.logits[:, -1].argmax(dim=-1, keepdim=True)
        for row, token in enumerate(tokens[:, 0].tolist()):
            if row in running and token not in stop_ids:
                answers[row].append(token)
            if row in running and (token in stop_ids or len(answers[row]) == limits[row]):
                running.remove(row)
        if not running:
            return answers
        positions = positions[:, -1:] + 1
        seen = torch.cat([seen, seen.new_ones(len(prompts), 1)], dim=1)
