"""Prefix tuning (Li & Liang 2021, 2101.00190) by PEFT: trained keys and values that every token of a layer sees.

They begin as the base's own keys and values of a text, without which little is learnt from few examples (section 7.4).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model, initialize_kv_prefix_from_past_key_values
from torch import nn
from transformers import Cache, PreTrainedModel

from loramill.jobs.train.methods import AdaptedModel


class PrefixModel(nn.Module):
    """A base that begins every row with the prefix, called as the base is: PEFT's own call takes no packed rows."""

    def __init__(self, tuned: PeftModel, tokens: int) -> None:
        super().__init__()
        self.tuned = tuned
        self.tokens = tokens

    def forward(self, position_ids: torch.Tensor, attention_mask: torch.Tensor, **inputs: Any) -> Any:
        """As the base's.

        Args:
            position_ids: int64 [B, T], without the prefix.
            attention_mask: [B, 1, T, T], added to the scores: 0 where a token sees another, and -inf elsewhere.
            inputs: what else the base takes.
        """
        prefix = attention_mask.new_zeros(*attention_mask.shape[:-1], self.tokens)
        return self.tuned.get_base_model()(
            position_ids=position_ids + self.tokens,
            attention_mask=torch.cat([prefix, attention_mask], dim=-1),
            past_key_values=self.cache(len(position_ids)),
            **inputs,
        )

    def cache(self, rows: int) -> Cache:
        """The prefix as a KV cache of `rows` sequences."""
        return self.tuned.get_prompt(batch_size=rows)


@contextmanager
def attach_prefix(model: PreTrainedModel, begin: Sequence[int]) -> Iterator[AdaptedModel]:
    """`model` with a prefix in fp32 that begins as the tokens `begin`; afterwards as it was before."""
    frozen = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    tuned = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=len(begin)))
    with torch.no_grad():
        read = model(input_ids=torch.tensor([begin], device=model.device), use_cache=True)
    initialize_kv_prefix_from_past_key_values(tuned, past_key_values=read.past_key_values)
    weights = {name: parameter for name, parameter in tuned.named_parameters() if parameter.requires_grad}
    try:
        yield AdaptedModel(model=PrefixModel(tuned, len(begin)), weights=weights, set_dropout=lambda on: None)
    finally:
        for parameter, requires_grad in frozen:
            parameter.requires_grad_(requires_grad)
