"""An adapter made part of a base's weights, and how far that moves what the model says.

The unmerged adapter is the measure: what the engine serves, and on what it was trained. Merged, a weight is rounded
once more; and merged into the original of a quantized base, it stands on other values than those it was trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from loramill.bases import Base, load_for_training
from loramill.chat import EncodedExample
from loramill.durable import new_folder
from loramill.errors import AdapterInvalid, Conflict, InvalidRequest
from loramill.jobs.batches import grouped, pack, supervised
from loramill.jobs.methods.peft_folder import WEIGHTS_FILE
from loramill.jobs.passes import predictions, prepared
from loramill.jobs.whole import write_whole
from loramill.types import Quantization, Value

#: Which of a quantized base's values an adapter is merged into.
Into = Literal["original", "dequantised"]
INTO: tuple[Into, ...] = get_args(Into)
Precision = Literal["bf16", "fp32"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

#: Nats a token from which a merge is refused unless the caller knows better.
MAX_KL = 0.02
#: Completion tokens that are compared at most: log-probabilities over a whole vocabulary take room.
_TOKENS = 2048
#: Tokens of one forward pass.
_PASS = 512
REPORT_FILE = "merge.json"


class Divergence(Value):
    """How far a model's answers are from another's, at each token of some completions.

    Attributes:
        kl: mean of KL(unmerged || merged), nats a token.
        largest: of a token.
        agreement: share of the tokens where both find the same one the likeliest.
        tokens, examples: that were compared.
    """

    kl: float
    largest: float
    agreement: float
    tokens: int
    examples: int


class MergeReport(Value):
    """What was merged into what, and what came of it."""

    adapter: str
    base: str
    fingerprint: str
    quantization: Quantization
    into: Into
    dtype: Precision
    max_kl: float
    divergence: Divergence


def merge(
    base: Base,
    adapter: Path,
    examples: Sequence[EncodedExample],
    to: Path,
    *,
    name: str,
    into: Into | None = None,
    dtype: Precision = "bf16",
    max_kl: float = MAX_KL,
    force: bool = False,
) -> MergeReport:
    """Writes base and adapter as one model, a Hugging Face folder with a report in it.

    Args:
        base: as it is served; its quantization says on what values the adapter was trained.
        adapter: a PEFT folder.
        examples: on whose completions the merged model is compared with the unmerged, in float32 arithmetic.
        to: must not be there yet, or be empty.
        name: of the adapter, for the report.
        into: the values that the adapter was trained on, by default: the dequantised ones of a quantized base.
        max_kl: nats a token.
        force: write it however far it is.

    Raises:
        Conflict: it is farther than `max_kl`; nothing is written.
        InvalidRequest: there are no values of this kind, or `to` holds something.
        AdapterInvalid: PEFT can't read the adapter, or it doesn't fit the base.
        DiskFull: no room.
    """
    quantized = base.quantization != "none"
    if into == "dequantised" and not quantized:
        raise InvalidRequest(f"The base '{base.name}' isn't quantized: merge into 'original'.", param="into")
    into = into or ("dequantised" if quantized else "original")
    chosen = _sample(examples)
    with new_folder(to) as folder:
        tuned = unmerged(_served(base), adapter)
        wanted = _log_probabilities(tuned.get_base_model(), chosen)
        if quantized and into == "original":
            tuned = unmerged(_served(replace(base, quantization="none")), adapter)
        precision = torch.bfloat16 if dtype == "bf16" else torch.float32
        model = _cast(_cast(_merged(tuned), precision), torch.float32)  # rounded, to be measured as it is written
        divergence = _compare(wanted, _log_probabilities(model, chosen), len(chosen))
        if divergence.kl > max_kl and not force:
            raise Conflict(
                f"Merged, {name} says something else: {divergence.kl:.3g} nats a token from the unmerged adapter, over "
                f"{divergence.tokens} tokens, and the bound is {max_kl:g}. {_advice(base, into, dtype)}Merge it all "
                "the same with --force, or a larger --max-kl.",
                param="max_kl",
            )
        report = MergeReport(
            adapter=name,
            base=base.name,
            fingerprint=base.fingerprint,
            quantization=base.quantization,
            into=into,
            dtype=dtype,
            max_kl=max_kl,
            divergence=divergence,
        )
        write_whole(_cast(model, precision), base.folder, folder)
        (folder / REPORT_FILE).write_text(report.model_dump_json(indent=1))
    return report


def _served(base: Base) -> PreTrainedModel:
    """The base with the values that it is served with, to compute with in float32."""
    return _cast(load_for_training(base, torch.bfloat16), torch.float32)


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model with its weights in `dtype`; `to` would round the rotary embedding's frequencies, too."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def unmerged(model: PreTrainedModel, adapter: Path) -> PeftModel:
    """`model` with the adapter of a PEFT folder on it.

    Raises:
        AdapterInvalid: PEFT can't read the adapter, or it doesn't fit the base.
    """
    try:
        with safe_open(adapter / WEIGHTS_FILE, framework="pt") as file:
            _untie(model, list(file.keys()))
        return PeftModel.from_pretrained(model, adapter)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise AdapterInvalid(f"PEFT can't put the adapter in {adapter.name} on this base: {error}") from error


def merged(model: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    """`model` with the adapter of a PEFT folder in its weights, added in float32; in its dtype.

    Raises:
        AdapterInvalid: PEFT can't read the adapter, or it doesn't fit the base.
    """
    dtype = model.dtype
    return _cast(_merged(unmerged(_cast(model, torch.float32), adapter)), dtype)


def _merged(tuned: PeftModel) -> PreTrainedModel:
    try:
        model: PreTrainedModel = tuned.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise AdapterInvalid(f"The adapter can't be merged: {error}") from error
    return model


def _untie(model: PreTrainedModel, tensors: Sequence[str]) -> None:
    """Gives the head a weight of its own, if the adapter changes it or the embedding: merged, they would be two."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding is None or head is None or embedding.weight is not head.weight:
        return
    names = [name for name, module in model.named_modules() if module is embedding or module is head]
    if any(f".{name}.lora_" in tensor for name in names for tensor in tensors):
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = False


def _sample(examples: Sequence[EncodedExample]) -> list[EncodedExample]:
    """As many of the examples, evenly, as have tokens enough."""
    total = sum(map(supervised, examples))
    if not total:
        raise InvalidRequest("There is no completion to compare the merged model on: give --valid a file with some.")
    every = max(1, -(-total // _TOKENS))
    return list(examples[::every])


@torch.no_grad()
def _log_probabilities(model: PreTrainedModel, examples: Sequence[EncodedExample]) -> list[torch.Tensor]:
    """Of every token of the vocabulary, at each completion token: float32 [S, vocabulary] for each group."""
    longest = max(len(example.tokens) for example in examples)
    with prepared(model, longest + _PASS, checkpointing=False):
        return [
            predictions(model, model, pack(group)).log_softmax(dim=-1)
            for group in grouped(examples, _PASS, packing=True)
        ]


def _compare(wanted: Sequence[torch.Tensor], found: Sequence[torch.Tensor], examples: int) -> Divergence:
    kl = torch.cat([(p.exp() * (p - q)).double().sum(dim=-1) for p, q in zip(wanted, found, strict=True)])
    same = torch.cat([p.argmax(dim=-1) == q.argmax(dim=-1) for p, q in zip(wanted, found, strict=True)])
    return Divergence(
        # Rounding may leave the mean of what is never below 0 a little below.
        kl=max(0.0, kl.mean().item()),
        largest=max(0.0, kl.max().item()),
        agreement=same.double().mean().item(),
        tokens=len(kl),
        examples=examples,
    )


def _advice(base: Base, into: Into, dtype: Precision) -> str:
    if base.quantization != "none" and into == "original":
        return f"It was trained on the base in {base.quantization}: merge it into those values (--into dequantised). "
    if dtype == "bf16":
        return "Rounding to bf16 costs some of that: try --dtype fp32. "
    return ""
