"""The methods by which a job trains a frozen base: one module per method, all with the same interface."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import TypeVar

import torch
from transformers import PreTrainedModel

from loramill.errors import AdapterInvalid
from loramill.jobs.train.methods import peft_folder
from loramill.jobs.train.methods.adalora import adalora_files, adalora_layers, load_adalora, new_rank_allocator
from loramill.jobs.train.methods.adapted_model import AdaptedModel
from loramill.jobs.train.methods.layers import LoraLinear, insert_layers
from loramill.jobs.train.methods.lora import dora_layers, gains_of, load_lora, lora_files, lora_layers, loraplus_factors
from loramill.jobs.train.methods.pissa_loftq import load_pissa, loftq_layers, pissa_files, pissa_layers
from loramill.jobs.train.methods.targets import TargetModule, find_target_modules
from loramill.kernels.batch import Slot
from loramill.kernels.peft_folder import BaseModules
from loramill.types import JobSpec

__all__ = ["AdaptedModel", "adapter_files", "attach_adapter", "load_start_adapter"]

_Tensor = TypeVar("_Tensor", bound=torch.Tensor)

#: No two adapters of a process get the same slot.
_slot_numbers = count()

_LOADERS = {"adalora": load_adalora, "pissa": load_pissa}
_EXPORTERS = {"adalora": adalora_files, "pissa": pissa_files}


@contextmanager
def attach_adapter(model: PreTrainedModel, spec: JobSpec, folder: Path) -> Iterator[AdaptedModel]:
    """Within, `model` has the fp32 layers of `spec`'s method over its frozen weights; afterwards it is as before.

    The layers are a function of the base, the spec and its seed; their dropout is off. Several adapters may be attached
    at once: `AdaptedModel.rows` then has to be set before each pass.

    Args:
        folder: the base's files; LoftQ reads the weights before quantization there.

    Raises:
        InvalidRequest: targets, layers, patterns or ranks don't fit the base; `param` names the field.
    """
    layers = _layers(model, find_target_modules(model, spec), spec, folder)
    for layer in layers.values():
        layer.shares_casts = not spec.gradient_checkpointing
    slot = Slot(next(_slot_numbers), 0)
    with insert_layers(model, layers, slot) as rows:
        yield replace(_adapted_model(model, layers, spec), slot=slot, rows=rows)


@torch.no_grad()
def load_start_adapter(adapted: AdaptedModel, folder: Path, spec: JobSpec) -> None:
    """Loads the adapter to start from: a PEFT folder made by a job of the same method, targets, ranks and scale.

    Raises:
        AdapterInvalid: the folder can't be read, or its adapter does not fit the job; `param` is "start_from".
    """
    base = BaseModules.of_model(adapted.model, adapted.model.get_output_embeddings())  # type: ignore[operator]  # a model of transformers
    _LOADERS.get(spec.method, load_lora)(adapted, peft_folder.read_start_adapter(folder, base), spec)


def adapter_files(
    spec: JobSpec, weights: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor], base: str
) -> dict[str, bytes]:
    """Returns the adapter in PEFT's files, as a LoRA or DoRA on the unmodified base.

    Args:
        weights, state: those of an `AdaptedModel`, as a checkpoint holds them: the state with what is derived.
        base: the base's name in the API.
    """
    return _EXPORTERS.get(spec.method, lora_files)(spec, weights, state, base)


def _layers(model: PreTrainedModel, targets: list[TargetModule], spec: JobSpec, folder: Path) -> dict[str, LoraLinear]:
    match spec.method:
        case "lora":
            return lora_layers(targets, spec)
        case "dora":
            return dora_layers(targets, spec)
        case "adalora":
            return adalora_layers(targets, spec)
        case "pissa":
            return pissa_layers(targets, spec)
        case "loftq":
            return loftq_layers(targets, spec, model, folder)
        case "full":
            raise AdapterInvalid("Full fine-tuning attaches nothing to the base; it has its own trainer.")


def _adapted_model(model: PreTrainedModel, layers: Mapping[str, LoraLinear], spec: JobSpec) -> AdaptedModel:
    weights = _with_full_names({name: layer.trained_parameters() for name, layer in layers.items()})
    adapted = AdaptedModel(
        model=model,
        weights=weights,
        set_dropout=lambda key: _set_dropout(layers, key),
        lr_factors=loraplus_factors(spec, weights),
        state=_with_full_names({name: layer.extra_state() for name, layer in layers.items()}),
        derived=lambda: gains_of(layers),
        after_step=lambda step: _invalidate_caches(layers),
    )
    if spec.method != "adalora":
        return adapted
    ranks = new_rank_allocator(spec, weights)

    def after_step(step: int) -> None:
        ranks.after_step(step)
        adapted.after_step(step)

    return replace(
        adapted,
        state=ranks.state,
        penalty=ranks.penalty,
        after_step=after_step,
        best_from_step=ranks.best_from_step,
    )


def _with_full_names(parts: Mapping[str, Mapping[str, _Tensor]]) -> dict[str, _Tensor]:
    """The tensors of all modules under their full names, sorted."""
    pairs = (
        (peft_folder.tensor_name(module, part), tensor) for module, own in parts.items() for part, tensor in own.items()
    )
    return dict(sorted(pairs))


def _set_dropout(layers: Mapping[str, LoraLinear], key: int | None) -> None:
    for layer in layers.values():
        layer.dropout_key = key


def _invalidate_caches(layers: Mapping[str, LoraLinear]) -> None:
    for layer in layers.values():
        layer.invalidate_cache()
