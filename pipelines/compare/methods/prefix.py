"""Prefix tuning (Li & Liang 2021, 2101.00190) by PEFT: trained keys and values that every token of a layer attends to.

They are initialized to the base's keys and values of a text, without which few examples have little effect (section
7.4).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model, initialize_kv_prefix_from_past_key_values
from torch import nn
from torch.nn import functional as F
from transformers import Cache, PreTrainedModel

from loramill.jobs.train.methods import AdaptedModel


class PrefixModel(nn.Module):
    """A base with the prefix before each row, called like the base: PEFT's own forward does not take packed rows."""

    def __init__(self, adapted: PeftModel, tokens: int) -> None:
        super().__init__()
        self.adapted = adapted
        self.tokens = tokens

    def forward(
        self, position_ids: torch.Tensor, attention_mask: torch.Tensor | dict[str, torch.Tensor], **inputs: Any
    ) -> Any:
        """The base's forward.

        Args:
            position_ids: int64 [B, T], without the prefix.
            attention_mask: [B, 1, T, T], added to the scores: 0 where a token attends to another, and -inf elsewhere;
                or one for each kind of layer.
            inputs: other arguments of the base.
        """
        masks = attention_mask if isinstance(attention_mask, dict) else {"": attention_mask}
        masks = {kind: F.pad(mask, (self.tokens, 0)) for kind, mask in masks.items()}
        return self.adapted.get_base_model()(
            position_ids=position_ids + self.tokens,
            attention_mask=masks.get("", masks),
            past_key_values=self.cache(len(position_ids)),
            **inputs,
        )

    def cache(self, rows: int) -> Cache:
        """The prefix as a KV cache of `rows` sequences."""
        return self.adapted.get_prompt(batch_size=rows)


@contextmanager
def attach_prefix(model: PreTrainedModel, begin: Sequence[int]) -> Iterator[AdaptedModel]:
    """Attaches a prefix in fp32, initialized to the tokens `begin`; the context's end removes it."""
    frozen = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    adapted = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=len(begin)))
    with torch.no_grad():
        read = model(input_ids=torch.tensor([begin], device=model.device), use_cache=True)
    initialize_kv_prefix_from_past_key_values(adapted, past_key_values=read.past_key_values)
    weights = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    try:
        yield AdaptedModel(
            model=PrefixModel(adapted, len(begin)), weights=weights, set_dropout=lambda on: None, needs_mask=True
        )
    finally:
        for parameter, requires_grad in frozen:
            parameter.requires_grad_(requires_grad)
