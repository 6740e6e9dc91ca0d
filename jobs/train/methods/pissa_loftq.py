"""PiSSA and LoftQ: adapters that start with a part of the base's weights instead of zero."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from loramill.errors import AdapterInvalid, BaseUnusable
from loramill.jobs.train.methods import peft_folder
from loramill.jobs.train.methods.adapted_model import AdaptedModel
from loramill.jobs.train.methods.layers import LoraLinear, dense_weight
from loramill.jobs.train.methods.lora import initial_factors
from loramill.jobs.train.methods.peft_folder import A, B, StoredAdapter, tensor_name
from loramill.jobs.train.methods.seeds import seeded
from loramill.jobs.train.methods.targets import TargetModule
from loramill.models.fingerprint import weight_files
from loramill.models.targets import scale_of
from loramill.types import JobSpec

#: Last parts of the names of the half that subtracts PiSSA's initial factors from the base.
A0, B0 = "lora_A0", "lora_B0"

#: Subspace iterations of a randomized SVD, and its number of additional singular vectors (Halko et al. 2011, 0909.4061,
#: algorithm 4.4). PEFT recommends 16 iterations without oversampling for PiSSA.
_ITERATIONS, _OVERSAMPLING = 4, 8


class ResidualLinear(LoraLinear):
    """y = W x + scale (B A - B0 A0) x: a LoRA of twice the rank, of which the second half is frozen.

    PiSSA trains BA over the base less its largest singular triples B0 A0 (Meng et al. 2024, 2404.02948, equations 2 to
    4); this is the same function of x, on the unmodified base.
    """

    def __init__(self, target: TargetModule, a: torch.Tensor, b: torch.Tensor, dropout: float) -> None:
        super().__init__(target, a.clone(), b.clone(), dropout)
        self.a0, self.b0 = a, b

    def extra_state(self) -> dict[str, torch.Tensor]:
        """Returns the half that is not trained."""
        return {A0: self.a0, B0: self.b0}

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns A above A0, and B left of -B0."""
        return torch.cat([self.a, self.a0]), torch.cat([self.b, -self.b0], dim=1)


def pissa_layers(targets: list[TargetModule], spec: JobSpec) -> dict[str, LoraLinear]:
    """Returns the layers of PiSSA, by name of their target module.

    Raises:
        AdapterInvalid: a linear has fewer singular values than its rank.
    """
    return {
        target.name: ResidualLinear(target, *_svd_factors(weight_of(target.linear), target, spec), spec.dropout)
        for target in targets
    }


def loftq_layers(
    targets: list[TargetModule], spec: JobSpec, model: PreTrainedModel, folder: Path
) -> dict[str, LoraLinear]:
    """Returns the layers of LoftQ, by name of their target module: LoRA that starts with the quantization error.

    One iteration of Li et al. 2023 (2310.08659, algorithm 1), after which the base is the plain quantized one.

    Args:
        folder: contains the base's weights before quantization.

    Raises:
        AdapterInvalid: the base is not quantized, or a linear has fewer singular values than its rank.
        BaseUnusable: the folder lacks a weight.
    """
    layers: dict[str, LoraLinear] = {}
    lossy = False
    with _original_weights(model, folder) as original:
        for target in targets:
            if (
                target.linear is model.get_output_embeddings()
            ):  # not quantized; its error is zero, and two factors of zero would get no gradient
                factors = initial_factors(target, spec)
            else:
                weight = weight_of(target.linear)
                lost = original(target.name).to(weight).float() - weight.float()
                lossy = lossy or bool(lost.any())
                factors = _svd_factors(lost, target, spec)
            layers[target.name] = LoraLinear(target, *factors, spec.dropout)
    if not lossy:
        raise AdapterInvalid(
            "LoftQ starts with the quantization error of the base, and this base is not quantized: use 'lora' or "
            "'pissa', or set the setting quantization to 'nf4'.",
            param="method",
        )
    return layers


def weight_of(linear: nn.Linear | Conv1D) -> torch.Tensor:
    """Returns a linear's weight [d_out, d_in], in its own dtype."""
    weight = dense_weight(linear)
    return weight if isinstance(weight, torch.Tensor) else weight()


def _svd_factors(weight: torch.Tensor, target: TargetModule, spec: JobSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns A and B, fp32, whose product times the scale is the best approximation of `weight` by its rank."""
    if target.rank > min(weight.shape):
        raise AdapterInvalid(
            f"The rank of {target.name} is {target.rank}, and that linear has {min(weight.shape)} singular values: "
            f"lower 'rank', or give it a lower one in 'rank_pattern'.",
            param="rank",
        )
    with seeded(weight.device, spec.seed, "svd", target.name):
        u, s, v = torch.svd_lowrank(weight.float(), min(target.rank + _OVERSAMPLING, *weight.shape), niter=_ITERATIONS)
    root = (s[: target.rank] / target.scale).sqrt()
    return (v[:, : target.rank] * root).T.contiguous(), u[:, : target.rank] * root


@contextmanager
def _original_weights(model: PreTrainedModel, folder: Path) -> Iterator[Callable[[str], torch.Tensor]]:
    """Yields a function that reads a linear's weight [d_out, d_in] from the folder, by the linear's name."""
    linears = dict(model.named_modules())
    with ExitStack() as open_files:
        files = [open_files.enter_context(safe_open(path, framework="pt")) for path in weight_files(folder)]
        holder = {key: file for file in files for key in file.keys()}  # noqa: SIM118  # it isn't iterable

        def original(name: str) -> torch.Tensor:
            # Some folders hold the model without its head, under shorter names.
            for key in (f"{name}.weight", f"{name.removeprefix(model.base_model_prefix + '.')}.weight"):
                if key in holder:
                    weight: torch.Tensor = holder[key].get_tensor(key)
                    return weight.T if isinstance(linears[name], Conv1D) else weight
            raise BaseUnusable(f"{folder} contains no '{name}.weight', which LoftQ starts with: use another method.")

        yield original


def pissa_files(
    spec: JobSpec, weights: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor], base: str
) -> dict[str, bytes]:
    """Returns PiSSA's adapter as a LoRA of twice the rank on the unmodified base."""
    tensors: dict[str, torch.Tensor] = {}
    for module in peft_folder.modules_of(weights):
        a, b, a0, b0 = _pissa_tensors(module, weights, state)
        tensors[tensor_name(module, A)] = torch.cat([a, a0])
        tensors[tensor_name(module, B)] = torch.cat([b, -b0], dim=1)
    # Twice the rank at the same scale.
    factor = math.sqrt(2) if spec.rslora else 2
    return peft_folder.peft_files(
        spec,
        tensors,
        base,
        r=2 * spec.rank,
        lora_alpha=factor * spec.alpha,
        rank_pattern={pattern: 2 * rank for pattern, rank in spec.rank_pattern.items()},
        alpha_pattern={pattern: factor * alpha for pattern, alpha in spec.alpha_pattern.items()},
    )


def load_pissa(adapted: AdaptedModel, stored: StoredAdapter, spec: JobSpec) -> None:
    """Loads an adapter of PiSSA.

    Raises:
        AdapterInvalid: its targets, ranks or scales differ from the job's.
    """
    modules = peft_folder.modules_of(adapted.weights)
    expected: dict[str, torch.Size] = {}
    for module in modules:
        a, b, *_ = _pissa_tensors(module, adapted.weights, adapted.state)
        expected[tensor_name(module, A)] = torch.Size((2 * a.shape[0], a.shape[1]))
        expected[tensor_name(module, B)] = torch.Size((b.shape[0], 2 * b.shape[1]))
    peft_folder.check_same(stored, expected, {module: scale_of(spec, module) for module in modules})
    for module in modules:
        a, b, a0, b0 = _pissa_tensors(module, adapted.weights, adapted.state)
        upper, lower = stored.tensors[tensor_name(module, A)].chunk(2)
        left, right = stored.tensors[tensor_name(module, B)].chunk(2, dim=1)
        for tensor, value in ((a, upper), (a0, lower), (b, left), (b0, -right)):
            tensor.copy_(value)


def _pissa_tensors(
    module: str, weights: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        weights[tensor_name(module, A)],
        weights[tensor_name(module, B)],
        state[tensor_name(module, A0)],
        state[tensor_name(module, B0)],
    )
