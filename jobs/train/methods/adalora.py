"""AdaLoRA (Zhang et al. 2023, 2303.10512): the linears that need it most get the highest ranks."""

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

#: Last part of the name of the singular values.
E = "lora_E"
#: Last parts of the names of the smoothed sensitivities and of their uncertainties.
_SENSITIVITY, _UNCERTAINTY = "sensitivity", "uncertainty"

#: When pruning begins and ends, as fractions of all steps.
PRUNING_BEGIN, PRUNING_END = 0.1, 0.6
#: Smoothing of the sensitivities and of their uncertainties, and the weight of the penalty, as in the authors' code.
#: With PEFT's default, 0.5, the penalty's gradient rivals that of a small loss: deltas grow to 1.5 times LoRA's.
_BETA_1, _BETA_2, _ORTHOGONALITY = 0.85, 0.85, 0.1


class AdaLoraLinear(LoraLinear):
    """y = W x + scale B diag(E) A x (equation 3); a penalty keeps A's rows and B's columns close to orthonormal.

    In the paper the singular values E start at zero, so that A and B get no gradient at first. Here B starts at zero
    and E at one: a job of a few hundred steps learns as fast as with LoRA.
    """

    def __init__(self, target: TargetModule, a: torch.Tensor, b: torch.Tensor, dropout: float) -> None:
        super().__init__(target, a, b, dropout)
        self.e = nn.Parameter(a.new_ones(len(a), 1))

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Returns A, B and the singular values."""
        return {**super().trained_parameters(), E: self.e}

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns diag(E) A, and B."""
        return self.a * self.e, self.b


def adalora_layers(targets: list[TargetModule], spec: JobSpec) -> dict[str, LoraLinear]:
    """Returns the layers of AdaLoRA, by name of their target module, at the rank before pruning.

    Raises:
        AdapterInvalid: that rank is below the one after pruning, or the job sets the ranks of single modules.
    """
    if spec.rank_pattern:
        raise AdapterInvalid(
            "AdaLoRA chooses the modules' ranks itself: leave 'rank_pattern' out, or use 'lora'.", param="rank_pattern"
        )
    if initial_rank(spec) < spec.rank:
        raise AdapterInvalid(
            f"'init_rank' is {spec.init_rank}, and AdaLoRA prunes from it down to 'rank', {spec.rank}: give more.",
            param="init_rank",
        )
    wide = [replace(target, rank=initial_rank(spec)) for target in targets]
    return {target.name: AdaLoraLinear(target, *initial_factors(target, spec), spec.dropout) for target in wide}


def initial_rank(spec: JobSpec) -> int:
    """Returns the rank before pruning."""
    return spec.init_rank or math.ceil(1.5 * spec.rank)


@dataclass(frozen=True, slots=True)
class RankAllocator:
    """Chooses which ranks are alive (sections 3.2 and 3.3), by importances smoothed over the steps.

    Attributes:
        spec: gives the rank and the number of steps.
        weights: all trained parameters, by name.
        state: the sensitivities and uncertainties, under the parameters' names with a suffix.
    """

    spec: JobSpec
    weights: Mapping[str, nn.Parameter]
    state: Mapping[str, torch.Tensor]

    @property
    def best_from_step(self) -> int:
        """The first step after which at most the job's rank is alive, in the mean over the modules."""
        return math.ceil(PRUNING_END * self.spec.steps)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Updates the importances and prunes, with the gradients of step `step` (from 1), after its update."""
        if step == 1 or step < PRUNING_END * self.spec.steps:
            self._update_importances()
        if step > PRUNING_BEGIN * self.spec.steps:
            self._prune(rank_budget(self.spec, step) * len(self._modules))

    def penalty(self) -> torch.Tensor:
        """The distance of A's rows and B's columns from orthonormality (equation 4, with the authors' weight)."""
        grams = [weight @ weight.T for name, weight in self.weights.items() if name.endswith(A)]
        grams += [weight.T @ weight for name, weight in self.weights.items() if name.endswith(B)]
        one = torch.eye(len(grams[0]), device=grams[0].device)
        return _ORTHOGONALITY * torch.stack([torch.linalg.vector_norm(gram - one) for gram in grams]).mean()

    @property
    def _modules(self) -> list[str]:
        return peft_folder.modules_of(self.weights)

    def _update_importances(self) -> None:
        """Equations 8 to 10: each weight's smoothed sensitivity |w dL/dw|, and the smoothed deviation from it."""
        weights = [weight.detach() for weight in self.weights.values()]
        gradients = [weight.grad for weight in self.weights.values() if weight.grad is not None]
        smoothed, deviations = (
            [self.state[f"{name}.{part}"] for name in self.weights] for part in (_SENSITIVITY, _UNCERTAINTY)
        )
        now = torch._foreach_abs(torch._foreach_mul(weights, gradients))
        torch._foreach_lerp_(smoothed, now, 1 - _BETA_1)
        torch._foreach_sub_(now, smoothed)
        torch._foreach_abs_(now)
        torch._foreach_lerp_(deviations, now, 1 - _BETA_2)

    def _prune(self, alive: float) -> None:
        """Sets all singular values to zero except those of the `alive` most important triples (equations 6 and 7)."""
        modules = self._modules
        scores = torch.stack([self._score(module) for module in modules])
        dead = torch.ones_like(scores, dtype=torch.bool).flatten()
        dead[scores.flatten().topk(int(alive)).indices] = False
        for module, row in zip(modules, dead.view_as(scores), strict=True):
            self.weights[tensor_name(module, E)][row] = 0.0

    def _score(self, module: str) -> torch.Tensor:
        """Returns the importance of each triple of a module, [r]."""
        a, b, e = (self._importance(tensor_name(module, part)) for part in (A, B, E))
        return e.flatten() + a.mean(dim=1) + b.mean(dim=0)

    def _importance(self, name: str) -> torch.Tensor:
        return self.state[f"{name}.{_SENSITIVITY}"] * self.state[f"{name}.{_UNCERTAINTY}"]


def new_rank_allocator(spec: JobSpec, weights: Mapping[str, nn.Parameter]) -> RankAllocator:
    """Returns an allocator before the first step."""
    state = {
        f"{name}.{part}": torch.zeros_like(weight, requires_grad=False)
        for name, weight in weights.items()
        for part in (_SENSITIVITY, _UNCERTAINTY)
    }
    return RankAllocator(spec, weights, state)


def rank_budget(spec: JobSpec, step: int) -> float:
    """Returns the mean rank that is alive after step `step` (from 1): a cubic decrease (section 3.3)."""
    first, last = PRUNING_BEGIN * spec.steps, PRUNING_END * spec.steps
    left = 1 - min(1.0, max(0.0, (step - first) / (last - first)))
    return spec.rank + (initial_rank(spec) - spec.rank) * left**3


def adalora_files(
    spec: JobSpec, weights: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor], base: str
) -> dict[str, bytes]:
    """Returns the adapter as a LoRA with the ranks that are alive; a module without any gets one rank of zeros."""
    tensors: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    for module in peft_folder.modules_of(weights):
        a, b, e = (weights[tensor_name(module, part)] for part in (A, B, E))
        alive = e.flatten() != 0
        alive[0] |= not alive.any()
        tensors[tensor_name(module, A)] = a[alive]
        tensors[tensor_name(module, B)] = b[:, alive] * e.flatten()[alive]
        ranks[module] = int(alive.sum())
    # alpha / r is the scale of every module, also for a reader that ignores patterns.
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
    """Loads an adapter of AdaLoRA: the singular triples of its product become the first triples.

    Raises:
        AdapterInvalid: its targets or scales differ from the job's, or a rank is above the job's before pruning.
    """
    modules = peft_folder.modules_of(adapted.weights)
    expected: dict[str, torch.Size] = {}
    for module in modules:
        a, b = (adapted.weights[tensor_name(module, part)] for part in (A, B))
        existing = stored.tensors.get(tensor_name(module, A))
        rank = min(len(a), len(a) if existing is None else len(existing))
        expected[tensor_name(module, A)] = torch.Size((rank, a.shape[1]))
        expected[tensor_name(module, B)] = torch.Size((b.shape[0], rank))
    peft_folder.check_same(stored, expected, {module: scale_of(spec, module) for module in modules})
    for module in modules:
        a, b, e = (adapted.weights[tensor_name(module, part)] for part in (A, B, E))
        u, s, v = _svd(stored.tensors[tensor_name(module, B)], stored.tensors[tensor_name(module, A)])
        a[: len(s)], b[:, : len(s)], e[: len(s), 0] = v.T.to(a), u.to(b), s.to(e)


def _svd(b: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns U [d_out, k], S [k] and V [d_in, k] of b [d_out, r] @ a [r, d_in], without computing the product."""
    left, of_left = torch.linalg.qr(b.float())
    right, of_right = torch.linalg.qr(a.float().T)
    u, s, v = torch.linalg.svd(of_left @ of_right.T, full_matrices=False)
    return left @ u, s, right @ v.T
