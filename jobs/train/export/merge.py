"""Merges an adapter into a base's weights, and measures how much that changes the model's predictions.

The reference is the unmerged adapter, as it was trained and as the engine serves it. A merged weight is rounded once
more; and merged into the original values of a quantized base, the adapter is added to other values than those it was
trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from loramill.data.encoding import EncodedExample
from loramill.errors import AdapterInvalid, Conflict, InvalidRequest
from loramill.jobs.train.batching import count_supervised_tokens, group_for_passes, pack
from loramill.jobs.train.export.hf import save_hf_model
from loramill.jobs.train.forward import attention_window, configured_forward, supervised_logits
from loramill.kernels import Delta
from loramill.kernels.peft_folder import BaseModules, read_adapter
from loramill.models.catalog import Base, load_for_training
from loramill.storage.atomic import new_folder
from loramill.types import FrozenModel, Quantization

#: The values of a quantized base that an adapter can be merged into.
Into = Literal["original", "dequantized"]
INTO: tuple[Into, ...] = get_args(Into)
Precision = Literal["bf16", "fp32"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

#: Nats per token above which a merge is refused by default.
MAX_KL = 0.02
#: Maximum number of compared completion tokens: log probabilities over a full vocabulary take 0.2 MB per token.
_COMPARED_TOKENS = 1024
#: Tokens of one forward pass.
_PASS_TOKENS = 512
REPORT_FILE = "merge.json"

#: Called with a description of each stage, for the user.
OnStage = Callable[[str], None]


class Divergence(FrozenModel):
    """The distance between the predictions of two models at each token of some completions.

    Attributes:
        kl: mean of KL(unmerged || merged), in nats per token.
        max_token_kl: the largest KL of one token, in nats.
        agreement: share of the tokens for which both models predict the same most likely token.
        tokens, examples: numbers of compared tokens and examples.
    """

    kl: float
    max_token_kl: float
    agreement: float
    tokens: int
    examples: int


class MergeReport(FrozenModel):
    """What was merged into what, with the measured divergence."""

    adapter: str
    base: str
    fingerprint: str
    quantization: Quantization
    into: Into
    dtype: Precision
    max_kl: float
    divergence: Divergence


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeOptions:
    """How an adapter is merged.

    Attributes:
        into: which of the base's values the adapter is added to; by default those it was trained on, which of a
            quantized base are the dequantized ones.
        dtype: of the merged weights.
        max_kl: divergence in nats per token above which the merge is refused.
        force: write the merged model whatever its divergence.
    """

    into: Into | None = None
    dtype: Precision = "bf16"
    max_kl: float = MAX_KL
    force: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch has it."""
        return torch.bfloat16 if self.dtype == "bf16" else torch.float32


def merge(
    base: Base,
    adapter: Path,
    examples: Sequence[EncodedExample],
    output: Path,
    *,
    name: str,
    options: MergeOptions = MergeOptions(),
    on_stage: OnStage = lambda stage: None,
) -> MergeReport:
    """Writes base and adapter as one model: a Hugging Face folder with a report in it.

    Args:
        base: as it is served; the adapter was trained on its values.
        adapter: PEFT folder.
        examples: the merged and the unmerged model are compared on their completions, in float32 arithmetic.
        output: folder that does not exist yet or is empty.
        name: the adapter's name, for the report.

    Raises:
        Conflict: the divergence is larger than `max_kl`; nothing is written.
        InvalidRequest: the base has no values of this kind, or `output` is not empty.
        AdapterInvalid: the adapter is damaged, incomplete or of another base, or changes no weight of this one.
        DiskFull: no space for the model.
    """
    into = _values_to_merge_into(base, options.into)
    compared = _choose_compared(examples)
    with new_folder(output) as folder:
        on_stage(f"loading {base.name}")
        model, deltas = _load(base, adapter)
        with with_adapter(model, deltas):
            unmerged = _log_probabilities(model, compared, "the adapter", on_stage)
        if base.quantization != "none" and into == "original":
            on_stage(f"loading {base.name}, not quantized")
            model, deltas = _load(replace(base, quantization="none"), adapter)  # DoRA's gains depend on the values
        on_stage("merging")
        model = _merge_and_round(model, deltas, base, name, options)
        merged = _log_probabilities(model, compared, "the merged model", on_stage)
        report = MergeReport(
            adapter=name,
            base=base.name,
            fingerprint=base.fingerprint,
            quantization=base.quantization,
            into=into,
            dtype=options.dtype,
            max_kl=options.max_kl,
            divergence=_measure_divergence(unmerged, merged, len(compared)),
        )
        if not options.force:
            _check_divergence(report)
        on_stage("writing")
        save_hf_model(_cast(model, options.torch_dtype), base.folder, folder)
        (folder / REPORT_FILE).write_text(report.model_dump_json(indent=1))
    return report


def _values_to_merge_into(base: Base, into: Into | None) -> Into:
    quantized = base.quantization != "none"
    if into == "dequantized" and not quantized:
        raise InvalidRequest(f"The base '{base.name}' is not quantized: merge into 'original'.", param="into")
    return into or ("dequantized" if quantized else "original")


def _load(base: Base, adapter: Path) -> tuple[PreTrainedModel, dict[str, Delta]]:
    model = _load_in_float32(base)
    return model, _read_adapter(model, adapter)


def _merge_and_round(
    model: PreTrainedModel, deltas: Mapping[str, Delta], base: Base, name: str, options: MergeOptions
) -> PreTrainedModel:
    """Merges the adapter and rounds the weights as they will be written, so that the written model is measured."""
    if not _merge_weights(model, deltas, options.torch_dtype):
        raise AdapterInvalid(
            f"The adapter {name} changes no weight of '{base.name}': all of its changes are 0 or are lost in rounding "
            f"to {options.dtype}. Nothing was written."
        )
    return _cast(_cast(model, options.torch_dtype), torch.float32)


def _check_divergence(report: MergeReport) -> None:
    divergence, max_kl = report.divergence, report.max_kl
    if divergence.kl > max_kl:
        raise Conflict(
            f"Merging changes the answers of {report.adapter}: its divergence from the unmerged adapter is "
            f"{divergence.kl:.3g} nats per token over {divergence.tokens} tokens, and the bound is {max_kl:g}. "
            f"{_advice(report)}Use --force or a larger --max-kl to merge it anyway.",
            param="max_kl",
        )


def _advice(report: MergeReport) -> str:
    if report.quantization != "none" and report.into == "original":
        return f"It was trained on the base in {report.quantization}: merge it into those values (--into dequantized). "
    if report.dtype == "bf16":
        return "Rounding to bf16 causes some of that: try --dtype fp32. "
    return ""


def _load_in_float32(base: Base) -> PreTrainedModel:
    """The base with the values that it is served with, for computing in float32."""
    return _cast(load_for_training(base, torch.bfloat16), torch.float32)


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Converts the weights to `dtype`; `model.to` would also round the frequencies of the rotary embedding."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def merge_into(model: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    """Adds the adapter of a PEFT folder to the weights of `model`, in float32; the weights keep their dtype.

    Raises:
        AdapterInvalid: the adapter is damaged, incomplete or of another base.
    """
    _merge_weights(model, _read_adapter(model, adapter), model.dtype)
    return model


def _read_adapter(model: PreTrainedModel, adapter: Path) -> dict[str, Delta]:
    """Reads the adapter as the engine does, so that the merged adapter is the served one.

    DoRA's gains are computed from the weights of `model`, which may be another quantization of the base.
    """
    return read_adapter(adapter, BaseModules.of_model(model, model.get_output_embeddings()), published_gains=False)


@contextmanager
def with_adapter(model: PreTrainedModel, deltas: Mapping[str, Delta]) -> Iterator[None]:
    """Within, `model` computes with an adapter next to its weights, as the engine does; in float32."""
    with ExitStack() as stack:
        for name, delta in deltas.items():
            module = model.get_submodule(name)
            stack.callback(module.register_forward_hook(partial(_add_adapter, delta)).remove)
        yield


def _add_adapter(delta: Delta, module: nn.Module, args: tuple[torch.Tensor, ...], y: torch.Tensor) -> torch.Tensor:
    """`y` with the adapter: `gain * (W x + scale B A x)`, to which a bias is added last."""
    x, a, b = args[0], delta.a.float(), delta.b.float()
    if delta.lookup:
        # Gemma's embedding scales its vectors.
        factor = getattr(module, "embed_scale", 1.0)
        return y + nn.functional.embedding(x, a.T) @ b.T * (delta.scale * factor)
    bias: torch.Tensor | float = 0.0 if module.bias is None else module.bias  # type: ignore[assignment]
    y = y - bias + x @ a.T @ b.T * delta.scale
    return (y if delta.gain is None else y * delta.gain) + bias


@torch.no_grad()
def _merge_weights(model: PreTrainedModel, deltas: Mapping[str, Delta], precision: torch.dtype) -> bool:
    """Adds an adapter to the weights, in float32, and converts them back to their dtype.

    Returns:
        Whether any weight changes in `precision`.
    """
    _untie_head(model, deltas)
    changed = False
    for name, delta in deltas.items():
        module = model.get_submodule(name)
        weight: torch.Tensor = module.weight
        change = delta.scale * (delta.b.float() @ delta.a.float())
        if delta.lookup or isinstance(module, Conv1D):  # transposed weights
            change = change.T
        new = weight.float() + change
        if delta.gain is not None:
            new *= delta.gain if isinstance(module, Conv1D) else delta.gain[:, None]
        changed = changed or not torch.equal(new.to(precision), weight.to(precision))
        weight.data = new.to(weight.dtype)
    return changed


def _untie_head(model: PreTrainedModel, deltas: Mapping[str, Delta]) -> None:
    """Gives the head its own weight if the adapter changes the head or the embedding: merged, the two would differ."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding is None or head is None or embedding.weight is not head.weight:
        return
    if any(module in (embedding, head) for module in map(model.get_submodule, deltas)):
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = False


def _choose_compared(examples: Sequence[EncodedExample]) -> list[EncodedExample]:
    """Chooses examples evenly, as many as have enough tokens together."""
    total = sum(map(count_supervised_tokens, examples))
    if not total:
        raise InvalidRequest("There is no completion to compare the merged model on: give --valid a file with some.")
    stride = max(1, -(-total // _COMPARED_TOKENS))
    return list(examples[::stride])


@torch.no_grad()
def _log_probabilities(
    model: PreTrainedModel, examples: Sequence[EncodedExample], of: str, on_stage: OnStage
) -> list[torch.Tensor]:
    """Log probabilities over the vocabulary at each completion token: float32 [S, vocabulary] per group."""
    longest = max(len(example.tokens) for example in examples)
    groups = list(group_for_passes(examples, _PASS_TOKENS, packing=True))
    found = []
    with configured_forward(model, longest + _PASS_TOKENS):
        for done, group in enumerate(groups):
            on_stage(f"computing the predictions of {of}, {done} of {len(groups)}")
            found.append(supervised_logits(model, model, pack(group, attention_window(model))).log_softmax(dim=-1))
    return found


def _measure_divergence(unmerged: Sequence[torch.Tensor], merged: Sequence[torch.Tensor], examples: int) -> Divergence:
    kl = torch.cat([(p.exp() * (p - q)).double().sum(dim=-1) for p, q in zip(unmerged, merged, strict=True)])
    same = torch.cat([p.argmax(dim=-1) == q.argmax(dim=-1) for p, q in zip(unmerged, merged, strict=True)])
    return Divergence(
        # A KL is never negative; rounding may leave its mean slightly below 0.
        kl=max(0.0, kl.mean().item()),
        max_token_kl=max(0.0, kl.max().item()),
        agreement=same.double().mean().item(),
        tokens=len(kl),
        examples=examples,
    )
