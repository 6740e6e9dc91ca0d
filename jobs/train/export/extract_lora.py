"""Extracts a LoRA from a fully fine-tuned model: the best approximation of each linear's change by a given rank."""

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
    """The approximation error of one module's change.

    Attributes:
        rank: rank of the module's adapter.
        change: Frobenius norm of the change.
        error: Frobenius norm of the part that the adapter leaves out, divided by `change`; 0 if nothing changed.
    """

    module: str
    rank: int
    change: float
    error: float


class ExtractionReport(FrozenModel):
    """How much of the training's change to the base the extracted adapter holds.

    Attributes:
        modules: the adapted modules, in the order of the model's files.
        error: Frobenius norm of the part of the adapted modules' change that is left out, divided by the change's.
        energy: the share of the adapted modules' squared change that the adapter holds: 1 - error^2.
        changes_left_out: Frobenius norms, by tensor, of changes that an adapter of these modules can't hold: of
            embeddings, norms, biases, and linears that are not targets.
        energy_of_all: the share of the squared change of all tensors that the adapter holds.
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
        squared_change: squared Frobenius norm of the change.
        squared_residual: squared Frobenius norm of the part that `b @ a` leaves out.
    """

    a: torch.Tensor
    b: torch.Tensor
    squared_change: float
    squared_residual: float


def low_rank_factors(change: torch.Tensor, rank: int) -> LowRankFactors:
    """Returns the two matrices of rank `rank` whose product is nearest to `change` [d_out, d_in].

    The truncated singular value decomposition is nearest (Eckart & Young 1936). It is computed from the eigenvectors of
    the smaller side's Gram matrix, in float64: several times faster than the full decomposition, and as exact for the
    largest singular values. Both matrices get the square root of the singular values, as in PEFT's PiSSA. The same
    change gives the same bits; each pair's sign makes the largest entry of its row of `a` positive.
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
    """Extracts the LoRA of the spec's targets and ranks that is nearest to what training changed.

    Args:
        model: the base, with the values that it is served with.
        weights: its parameters after training, by name; tied ones once.
        base: the base's name in the API.

    Returns:
        The adapter in PEFT's files, by name, and the report.

    Raises:
        InvalidRequest: a target, layer or pattern of the spec matches nothing.
    """
    before = {name: each.detach() for name, each in model.named_parameters()}
    factors: dict[str, LowRankFactors] = {}
    for target in find_target_modules(model, spec):
        name = f"{target.name}.weight"
        change = weights[name] - before.pop(name).float()
        factors[target.name] = low_rank_factors(change.T if isinstance(target.linear, Conv1D) else change, target.rank)
    left_out = {name: _squared_norm((weights[name] - each.float()).double()) for name, each in before.items()}
    return _files(factors, spec, base), extraction_report(factors, left_out)


def _files(factors: Mapping[str, LowRankFactors], spec: JobSpec, base: str) -> dict[str, bytes]:
    tensors = {
        tensor_name(module, part): matrix
        for module, each in factors.items()
        for part, matrix in ((A, each.a), (B, each.b))
    }
    ranks = {module: len(each.a) for module, each in factors.items() if len(each.a) != spec.rank}
    scale_of_1: dict[str, object] = {"lora_alpha": spec.rank, "alpha_pattern": ranks, "use_rslora": False}
    return peft_files(spec, tensors, base, rank_pattern=ranks, lora_dropout=0.0, **scale_of_1)


def extraction_report(
    factors: Mapping[str, LowRankFactors], squared_changes_left_out: Mapping[str, float]
) -> ExtractionReport:
    """Sums up the modules' errors.

    Args:
        factors: by module.
        squared_changes_left_out: squared Frobenius norms of the other tensors' changes.
    """
    change = sum(each.squared_change for each in factors.values())
    missed = sum(each.squared_residual for each in factors.values())
    everything = change + sum(squared_changes_left_out.values())
    return ExtractionReport(
        modules=tuple(
            ModuleError(
                module=name,
                rank=len(each.a),
                change=each.squared_change**0.5,
                error=_ratio(each.squared_residual, each.squared_change) ** 0.5,
            )
            for name, each in factors.items()
        ),
        error=_ratio(missed, change) ** 0.5,
        energy=1 - _ratio(missed, change),
        changes_left_out={name: square**0.5 for name, square in squared_changes_left_out.items() if square},
        energy_of_all=1 - _ratio(missed + sum(squared_changes_left_out.values()), everything),
    )


def _ratio(part: float, total: float) -> float:
    return part / total if total else 0.0
