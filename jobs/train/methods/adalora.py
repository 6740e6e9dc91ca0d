"""AdaLoRA (Zhang et al. 2023, 2303.10512): ranks go to the linears where they matter most."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from loramill.errors import AdapterInvalid
from loramill.jobs.train.methods import peft_folder
from loramill.jobs.train.methods.adapted_model import AdaptedModel
from loramill.jobs.train.methods.layers import LoraLinear
from loramill.jobs.train.methods.lora import initial_factors
from loramill.jobs.train.methods.peft_folder import A, B, StoredAdapter, tensor_name
from loramill.jobs.train.methods.targets import TargetModule
from loramill.models.targets import scale_of
from loramill.types import JobSpec

#: The singular values, under the end of their name.
E = "lora_E"
#: Of a sensitivity, smoothed, and of how it varies, under the ends of their names.
_SENSITIVITY, _UNCERTAINTY = "sensitivity", "uncertainty"

#: When pruning begins and ends, as parts of all steps.
PRUNING_BEGIN, PRUNING_END = 0.1, 0.6
#: Smoothing of the sensitivities and of their uncertainty, and the weight of the penalty, as in the authors' code. At
#: PEFT's default, 0.5, the penalty's gradient rivals that of a nearly learnt loss: deltas grow to 1.5 times LoRA's.
_BETA_1, _BETA_2, _ORTHOGONALITY = 0.85, 0.85, 0.1


class AdaLoraLinear(LoraLinear):
    """y = W x + scale B diag(E) A x (equation 3); a penalty draws A's rows and B's columns towards orthonormal ones.

    In the paper the singular values E begin at zero, so that at first A and B don't learn at all. Here B does, and E at
    one: a job of a few hundred steps learns as fast as by LoRA.
    """

    def __init__(self, target: TargetModule, a: torch.Tensor, b: torch.Tensor, dropout: float) -> None:
        super().__init__(target, a, b, dropout)
        self.e = nn.Parameter(a.new_ones(len(a), 1))

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """With the singular values."""
        return {**super().trained_parameters(), E: self.e}

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """diag(E) A and B."""
        return self.a * self.e, self.b


def adalora_layers(targets: list[TargetModule], spec: JobSpec) -> dict[str, LoraLinear]:
    """The layers of AdaLoRA, by name of their place, at the rank before pruning.

    Raises:
        AdapterInvalid: that rank is below the one after, or the job gives single modules ranks.
    """
    if spec.rank_pattern:
        raise AdapterInvalid(
            "AdaLoRA finds the modules' ranks itself: leave 'rank_pattern' out, or use 'lora'.", param="rank_pattern"
        )
    if initial_rank(spec) < spec.rank:
        raise AdapterInvalid(
            f"'init_rank' is {spec.init_rank}, and AdaLoRA prunes from it down to 'rank', {spec.rank}: give more.",
            param="init_rank",
        )
    wide = [replace(place, rank=initial_rank(spec)) for place in targets]
    return {place.name: AdaLoraLinear(place, *initial_factors(place, spec), spec.dropout) for place in wide}


def initial_rank(spec: JobSpec) -> int:
    """The rank before pruning."""
    return spec.init_rank or math.ceil(1.5 * spec.rank)


@dataclass(frozen=True, slots=True)
class RankAllocator:
    """Which ranks are alive (section 3.2 and 3.3), from importances smoothed over the steps.

    Attributes:
        spec: rank and steps.
        weights: all trained parameters by name.
        state: the sensitivities and uncertainties, under the parameters' names and an end of their own.
    """

    spec: JobSpec
    weights: Mapping[str, nn.Parameter]
    state: Mapping[str, torch.Tensor]

    @property
    def best_from_step(self) -> int:
        """The first step after which no more than the job's rank is alive in the mean."""
        return math.ceil(PRUNING_END * self.spec.steps)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Notes the importances and prunes; to be called with gradients, after the update of step `step` (from 1)."""
        if step == 1 or step < PRUNING_END * self.spec.steps:
            self._update_importances()
        if step > PRUNING_BEGIN * self.spec.steps:
            self._prune(rank_budget(self.spec, step) * len(self._modules))

    def penalty(self) -> torch.Tensor:
        """How far A's rows and B's columns are from orthonormal (equation 4, as the authors' code weighs it)."""
        grams = [weight @ weight.T for name, weight in self.weights.items() if name.endswith(A)]
        grams += [weight.T @ weight for name, weight in self.weights.items() if name.endswith(B)]
        one = torch.eye(len(grams[0]), device=grams[0].device)
        return _ORTHOGONALITY * torch.stack([torch.linalg.vector_norm(gram - one) for gram in grams]).mean()

    @property
    def _modules(self) -> list[str]:
        return peft_folder.modules_of(self.weights)

    def _update_importances(self) -> None:
        """Equations 8 to 10: the sensitivity |w dL/dw| of each weight, smoothed, and how far it strays from that."""
        weights = [weight.detach() for weight in self.weights.values()]
        gradients = [weight.grad for weight in self.weights.values() if weight.grad is not None]
        smoothed, strayed = (
            [self.state[f"{name}.{part}"] for name in self.weights] for part in (_SENSITIVITY, _UNCERTAINTY)
        )
        now = torch._foreach_abs(torch._foreach_mul(weights, gradients))
        torch._foreach_lerp_(smoothed, now, 1 - _BETA_1)
        torch._foreach_sub_(now, smoothed)
        torch._foreach_abs_(now)
        torch._foreach_lerp_(strayed, now, 1 - _BETA_2)

    def _prune(self, alive: float) -> None:
        """Sets all singular values but those of the `alive` most important triples to zero (equations 6 and 7)."""
        modules = self._modules
        scores = torch.stack([self._score(module) for module in modules])
        dead = torch.ones_like(scores, dtype=torch.bool).flatten()
        dead[scores.flatten().topk(int(alive)).indices] = False
        for module, row in zip(modules, dead.view_as(scores), strict=True):
            self.weights[tensor_name(module, E)][row] = 0.0

    def _score(self, module: str) -> torch.Tensor:
        """The importance of each triple of a module, [r]."""
        a, b, e = (self._importance(tensor_name(module, part)) for part in (A, B, E))
        return e.flatten() + a.mean(dim=1) + b.mean(dim=0)

    def _importance(self, name: str) -> torch.Tensor:
        return self.state[f"{name}.{_SENSITIVITY}"] * self.state[f"{name}.{_UNCERTAINTY}"]


def new_rank_allocator(spec: JobSpec, weights: Mapping[str, nn.Parameter]) -> RankAllocator:
    """An allocator at its beginning."""
    state = {
        f"{name}.{part}": torch.zeros_like(weight, requires_grad=False)
        for name, weight in weights.items()
        for part in (_SENSITIVITY, _UNCERTAINTY)
    }
    return RankAllocator(spec, weights, state)


def rank_budget(spec: JobSpec, step: int) -> float:
    """The mean rank that is alive after step `step` (from 1): a cubic way down (section 3.3)."""
    first, last = PRUNING_BEGIN * spec.steps, PRUNING_END * spec.steps
    left = 1 - min(1.0, max(0.0, (step - first) / (last - first)))
    return spec.rank + (initial_rank(spec) - spec.rank) * left**3


def adalora_files(
    spec: JobSpec, weights: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor], base: str
) -> dict[str, bytes]:
    """The adapter as a LoRA whose modules have the ranks that are alive; one of zeros where none is."""
    tensors: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    for module in peft_folder.modules_of(weights):
        a, b, e = (weights[tensor_name(module, part)] for part in (A, B, E))
        alive = e.flatten() != 0
        alive[0] |= not alive.any()
        tensors[tensor_name(module, A)] = a[alive]
        tensors[tensor_name(module, B)] = b[:, alive] * e.flatten()[alive]
        ranks[module] = int(alive.sum())
    # alpha / r is the scale everywhere, whether or not a reader knows of patterns.
    largest = max(ranks.values())
    return peft_folder.peft_files(
        spec,
        tensors,
        base,
        r=largest,
        lora_alpha=largest * scale_of(spec, ""),
        use_rslora=False,
        rank_pattern=ranks,
        alpha_pattern={module: rank * scale_of(spec, module) for module, rank in ranks.items()},
    )


def load_adalora(adapted: AdaptedModel, stored: StoredAdapter, spec: JobSpec) -> None:
    """Continues from the files of AdaLoRA, in place: their product's singular triples come first.

    Raises:
        AdapterInvalid: their targets or scales are others, or a rank is above the job's before pruning.
    """
    modules = peft_folder.modules_of(adapted.weights)
    wanted: dict[str, torch.Size] = {}
    for module in modules:
        a, b = (adapted.weights[tensor_name(module, part)] for part in (A, B))
        there = stored.tensors.get(tensor_name(module, A))
        rank = min(len(a), len(a) if there is None else len(there))
        wanted[tensor_name(module, A)] = torch.Size((rank, a.shape[1]))
        wanted[tensor_name(module, B)] = torch.Size((b.shape[0], rank))
    peft_folder.check_same(stored, wanted, {module: scale_of(spec, module) for module in modules})
    for module in modules:
        a, b, e = (adapted.weights[tensor_name(module, part)] for part in (A, B, E))
        u, s, v = _svd(stored.tensors[tensor_name(module, B)], stored.tensors[tensor_name(module, A)])
        a[: len(s)], b[:, : len(s)], e[: len(s), 0] = v.T.to(a), u.to(b), s.to(e)


def _svd(b: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U [d_out, k], S [k] and V [d_in, k] of the product of b [d_out, r] and a [r, d_in], without making it."""
    left, of_left = torch.linalg.qr(b.float())
    right, of_right = torch.linalg.qr(a.float().T)
    u, s, v = torch.linalg.svd(of_left @ of_right.T, full_matrices=False)
    return left @ u, s, right @ v.T
