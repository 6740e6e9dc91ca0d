"""A LoRA out of a fully fine-tuned model: of each linear's change, the best approximation of a given rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from loramill.jobs.train.methods.peft_folder import A, B, peft_files, tensor_name
from loramill.jobs.train.methods.targets import find_target_modules
from loramill.types import FrozenModel, JobSpec


class ModuleError(FrozenModel):
    """How well one module's change is held.

    Attributes:
        rank: of its adapter.
        change: Frobenius norm of the change.
        error: Frobenius norm of what the adapter leaves out, over that of the change; 0 where nothing changed.
    """

    module: str
    rank: int
    change: float
    error: float


class ExtractionReport(FrozenModel):
    """What the extracted adapter holds of the change that training made to the base.

    Attributes:
        modules: those that are adapted, in the order of the model's files.
        error: Frobenius norm of what is left out of the adapted modules' change, over that of the change.
        energy: the share of the squared change that is held, of the adapted modules: 1 - error^2.
        left: Frobenius norms of the changes that no adapter of these modules can hold, by tensor: embeddings, norms,
            biases, and linears that weren't targeted.
        energy_of_all: the share of the squared change that is held, of everything.
    """

    modules: tuple[ModuleError, ...]
    error: float
    energy: float
    changes_left_out: dict[str, float]
    energy_of_all: float


@dataclass(frozen=True, slots=True)
class LowRankFactors:
    """A change [d_out, d_in] as `b @ a`, float32.

    Attributes:
        a: [r, d_in].
        b: [d_out, r].
        change, left: squared Frobenius norms of the change, and of what `b @ a` leaves out of it.
    """

    a: torch.Tensor
    b: torch.Tensor
    squared_change: float
    squared_residual: float


def low_rank_factors(change: torch.Tensor, rank: int) -> LowRankFactors:
    """The matrices of rank `rank`, or of the smaller side, whose product is nearest to `change` [d_out, d_in].

    The truncated singular value decomposition is nearest (Eckart & Young 1936). It is found through the eigenvectors of
    the smaller side's Gram matrix, in float64: several times faster than the whole decomposition, and as exact for
    what counts here. Both matrices get the root of the singular values, as peft's PiSSA has it. The same change gives
    the same bits; each pair's sign is such that the largest entry of its row of `a` is positive.
    """
    wide = change.double()
    across = wide.shape[0] < wide.shape[1]
    side = wide.T if across else wide
    _, vectors = torch.linalg.eigh(side.T @ side)
    right = vectors[:, -min(rank, vectors.shape[1]) :].flip(1)  # the largest first
    left = side @ right
    lengths = torch.linalg.vector_norm(left, dim=0)
    roots = lengths.sqrt()
    left = left / torch.where(roots > 0, roots, 1.0)
    right = right * roots
    b, a = (right, left.T) if across else (left, right.T)
    signs = torch.gather(a, 1, a.abs().argmax(dim=1, keepdim=True)).sign()
    signs[signs == 0] = 1
    a, b = (a * signs).float(), (b * signs.T).float()
    remainder = wide - b.double() @ a.double()
    return LowRankFactors(a.contiguous(), b.contiguous(), _squared_norm(wide), _squared_norm(remainder))


def _squared_norm(matrix: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix)) ** 2


def extract_lora(
    model: PreTrainedModel, weights: Mapping[str, torch.Tensor], spec: JobSpec, base: str
) -> tuple[dict[str, bytes], ExtractionReport]:
    """The LoRA of the spec's targets and ranks that is nearest to what training changed.

    Args:
        model: the base, with the values that it is served with.
        weights: what became of its parameters, by name; tied ones once.
        base: the base's name on the wire.

    Returns:
        The adapter in PEFT's files, by name; and what it holds.

    Raises:
        InvalidRequest: a target, layer or pattern of the spec matches nothing.
    """
    before = {name: each.detach() for name, each in model.named_parameters()}
    found: dict[str, LowRankFactors] = {}
    for place in find_target_modules(model, spec):
        name = f"{place.name}.weight"
        change = weights[name] - before.pop(name).float()
        found[place.name] = low_rank_factors(change.T if isinstance(place.linear, Conv1D) else change, place.rank)
    left = {name: _squared_norm((weights[name] - each.float()).double()) for name, each in before.items()}
    return _files(found, spec, base), extraction_report(found, left)


def _files(found: Mapping[str, LowRankFactors], spec: JobSpec, base: str) -> dict[str, bytes]:
    tensors = {
        tensor_name(module, part): matrix
        for module, each in found.items()
        for part, matrix in ((A, each.a), (B, each.b))
    }
    ranks = {module: len(each.a) for module, each in found.items() if len(each.a) != spec.rank}
    scales_by_1: dict[str, object] = {"lora_alpha": spec.rank, "alpha_pattern": ranks, "use_rslora": False}
    return peft_files(spec, tensors, base, rank_pattern=ranks, lora_dropout=0.0, **scales_by_1)


def extraction_report(
    found: Mapping[str, LowRankFactors], squared_changes_left_out: Mapping[str, float]
) -> ExtractionReport:
    """Adds the modules' errors up.

    Args:
        found: by module.
        left: squared Frobenius norms of the other tensors' changes.
    """
    change = sum(each.squared_change for each in found.values())
    missed = sum(each.squared_residual for each in found.values())
    everything = change + sum(squared_changes_left_out.values())
    return ExtractionReport(
        modules=tuple(
            ModuleError(
                module=name,
                rank=len(each.a),
                change=each.squared_change**0.5,
                error=_ratio(each.squared_residual, each.squared_change) ** 0.5,
            )
            for name, each in found.items()
        ),
        error=_ratio(missed, change) ** 0.5,
        energy=1 - _ratio(missed, change),
        changes_left_out={name: square**0.5 for name, square in squared_changes_left_out.items() if square},
        energy_of_all=1 - _ratio(missed + sum(squared_changes_left_out.values()), everything),
    )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
