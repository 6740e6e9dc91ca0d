"""An adapter made part of a base's weights, and how far that moves what the model says.

The unmerged adapter is the measure: what the engine serves, and on what it was trained. Merged, a weight is rounded
once more; and merged into the original of a quantized base, it stands on other values than those it was trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from loramill.data.tokenizer import EncodedExample
from loramill.errors import AdapterInvalid, Conflict, InvalidRequest
from loramill.jobs.train.batching import count_supervised_tokens, group_for_passes, pack
from loramill.jobs.train.forward import configured_forward, supervised_logits
from loramill.jobs.train.hf_export import save_hf_model
from loramill.kernels import Delta
from loramill.kernels.peft_folder import BaseModules, read_adapter
from loramill.models.catalog import Base, load_for_training
from loramill.storage.atomic import new_folder
from loramill.types import FrozenModel, Quantization

#: Which of a quantized base's values an adapter is merged into.
Into = Literal["original", "dequantised"]
INTO: tuple[Into, ...] = get_args(Into)
Precision = Literal["bf16", "fp32"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

#: Nats a token from which a merge is refused unless the caller knows better.
MAX_KL = 0.02
#: Completion tokens that are compared at most: log probabilities over a whole vocabulary take 0.2 MB per token.
_COMPARED_TOKENS = 1024
#: Tokens of one forward pass.
_PASS_TOKENS = 512
REPORT_FILE = "merge.json"

#: Called with a description of the next stage, for the user.
OnStage = Callable[[str], None]


class Divergence(FrozenModel):
    """How far a model's answers are from another's, at each token of some completions.

    Attributes:
        kl: mean of KL(unmerged || merged), nats a token.
        largest: of a token.
        agreement: share of the tokens where both find the same one the likeliest.
        tokens, examples: that were compared.
    """

    kl: float
    max_token_kl: float
    agreement: float
    tokens: int
    examples: int


class MergeReport(FrozenModel):
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
    output: Path,
    *,
    name: str,
    into: Into | None = None,
    dtype: Precision = "bf16",
    max_kl: float = MAX_KL,
    force: bool = False,
    on_stage: OnStage = lambda stage: None,
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
        AdapterInvalid: the adapter is broken, incomplete or of another base, or changes no weight of this one.
        DiskFull: no room.
    """
    quantized = base.quantization != "none"
    if into == "dequantised" and not quantized:
        raise InvalidRequest(f"The base '{base.name}' isn't quantized: merge into 'original'.", param="into")
    into = into or ("dequantised" if quantized else "original")
    chosen = _choose_compared(examples)
    precision = torch.bfloat16 if dtype == "bf16" else torch.float32
    with new_folder(output) as folder:
        on_stage(f"loading {base.name}")
        model = _load_in_float32(base)
        deltas = _read_adapter(model, adapter)
        with with_adapter(model, deltas):
            wanted = _log_probabilities(model, chosen, "the adapter", on_stage)
        if quantized and into == "original":
            on_stage(f"loading {base.name}, not quantized")
            model = _load_in_float32(replace(base, quantization="none"))
            deltas = _read_adapter(model, adapter)  # DoRA's gains depend on the values
        on_stage("merging")
        if not _merge_weights(model, deltas, precision):
            raise AdapterInvalid(
                f"The adapter {name} changes no weight of '{base.name}': everything that it adds is 0, or is lost in "
                f"rounding to {dtype}. Nothing was written."
            )
        model = _cast(_cast(model, precision), torch.float32)  # rounded, so that what is measured is what is written
        divergence = _measure_divergence(
            wanted, _log_probabilities(model, chosen, "the merged model", on_stage), len(chosen)
        )
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
        on_stage("writing")
        save_hf_model(_cast(model, precision), base.folder, folder)
        (folder / REPORT_FILE).write_text(report.model_dump_json(indent=1))
    return report


def _load_in_float32(base: Base) -> PreTrainedModel:
    """The base with the values that it is served with, to compute with in float32."""
    return _cast(load_for_training(base, torch.bfloat16), torch.float32)


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model with its weights in `dtype`; `to` would round the rotary embedding's frequencies, too."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def merge_into(model: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    """`model` with the adapter of a PEFT folder in its weights, added in float32; in its dtype.

    Raises:
        AdapterInvalid: the adapter is broken, incomplete or of another base.
    """
    _merge_weights(model, _read_adapter(model, adapter), model.dtype)
    return model


def _read_adapter(model: PreTrainedModel, adapter: Path) -> dict[str, Delta]:
    """Reads the adapter as the engine does, so that what is merged is what is served."""
    return read_adapter(adapter, BaseModules.of_model(model, model.get_output_embeddings()))


@contextmanager
def with_adapter(model: PreTrainedModel, deltas: Mapping[str, Delta]) -> Iterator[None]:
    """`model` computes with an adapter next to its weights, as the engine does; for float32."""
    with ExitStack() as stack:
        for name, delta in deltas.items():
            module = model.get_submodule(name)
            stack.callback(module.register_forward_hook(partial(_add_adapter, delta)).remove)
        yield


def _add_adapter(delta: Delta, module: nn.Module, args: tuple[torch.Tensor, ...], y: torch.Tensor) -> torch.Tensor:
    """`y` with the adapter: `gain * (W x + scale B A x)`, to which a bias is added last."""
    x, a, b = args[0], delta.a.float(), delta.b.float()
    if delta.lookup:
        # Gemma's embedding multiplies its vectors.
        factor = getattr(module, "embed_scale", 1.0)
        return y + nn.functional.embedding(x, a.T) @ b.T * (delta.scale * factor)
    bias: torch.Tensor | float = 0.0 if module.bias is None else module.bias  # type: ignore[assignment]
    y = y - bias + x @ a.T @ b.T * delta.scale
    return (y if delta.gain is None else y * delta.gain) + bias


@torch.no_grad()
def _merge_weights(model: PreTrainedModel, deltas: Mapping[str, Delta], precision: torch.dtype) -> bool:
    """Adds an adapter to the weights, in float32, and converts them back to their dtype.

    Returns:
        Whether a weight changes in `precision`.
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
    """Gives the head a weight of its own, if the adapter changes it or the embedding: merged, they would be two."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding is None or head is None or embedding.weight is not head.weight:
        return
    if any(module in (embedding, head) for module in map(model.get_submodule, deltas)):
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = False


def _choose_compared(examples: Sequence[EncodedExample]) -> list[EncodedExample]:
    """As many of the examples, evenly, as have tokens enough."""
    total = sum(map(count_supervised_tokens, examples))
    if not total:
        raise InvalidRequest("There is no completion to compare the merged model on: give --valid a file with some.")
    every = max(1, -(-total // _COMPARED_TOKENS))
    return list(examples[::every])


@torch.no_grad()
def _log_probabilities(
    model: PreTrainedModel, examples: Sequence[EncodedExample], of: str, on_stage: OnStage
) -> list[torch.Tensor]:
    """Of every token of the vocabulary, at each completion token: float32 [S, vocabulary] for each group."""
    longest = max(len(example.tokens) for example in examples)
    groups = list(group_for_passes(examples, _PASS_TOKENS, packing=True))
    found = []
    with configured_forward(model, longest + _PASS_TOKENS, checkpointing=False):
        for done, group in enumerate(groups):
            on_stage(f"computing the predictions of {of}, {done} of {len(groups)}")
            found.append(supervised_logits(model, model, pack(group)).log_softmax(dim=-1))
    return found


def _measure_divergence(wanted: Sequence[torch.Tensor], found: Sequence[torch.Tensor], examples: int) -> Divergence:
    kl = torch.cat([(p.exp() * (p - q)).double().sum(dim=-1) for p, q in zip(wanted, found, strict=True)])
    same = torch.cat([p.argmax(dim=-1) == q.argmax(dim=-1) for p, q in zip(wanted, found, strict=True)])
    return Divergence(
        # Rounding may leave the mean of what is never below 0 a little below.
        kl=max(0.0, kl.mean().item()),
        max_token_kl=max(0.0, kl.max().item()),
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
