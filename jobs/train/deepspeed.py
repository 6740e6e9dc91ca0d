"""DeepSpeed's ZeRO around a model of which every weight is trained.

The model computes in its own dtype; AdamW keeps each weight and its two moments in float32. The spec's `offload` says
what is in host memory instead of the GPU's: nothing, the float32 weights with their moments and update (ZeRO-Offload:
Ren et al. 2021, arXiv 2101.06840), or the model's own weights, too (ZeRO stage 3: Rajbhandari et al. 2020, arXiv
1910.02054, section 5.3).

The only module that uses private names of DeepSpeed; tests/test_private_apis.py names the version they were read from.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed, nn
from transformers import PreTrainedModel

from loramill.errors import SetupError
from loramill.jobs.train.distributed import ProcessGroup
from loramill.jobs.train.optimizer import OptimizerState
from loramill.types import JobSpec

log = logging.getLogger(__name__)

#: Elements of the buffer that gathers gradients: DeepSpeed's default of half a billion would take a gigabyte.
_BUCKET_ELEMENTS = 50_000_000

_MOMENTS = ("exp_avg", "exp_avg_sq")


class ZeroOptimizer:
    """DeepSpeed as the `Optimizer` of every weight of a model.

    Attributes:
        model: called like the model; `backward` takes a loss of its last call.
        weights: the parameters by name, tied ones once. DeepSpeed may have moved their content elsewhere.
    """

    collective = True

    def __init__(self, engine: Any, process_group: ProcessGroup) -> None:
        self.model = engine
        self.weights: dict[str, nn.Parameter] = dict(engine.module.named_parameters())
        self._process_group = process_group

    @torch.no_grad()
    def load_state(self, step: int, state: OptimizerState | None) -> None:
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        self._create_moments(step)
        if state is None:
            return
        for name, parameter in self.weights.items():
            with GatheredParameters([parameter], modifier_rank=0):
                parameter.copy_(state.weights[name])
            safe_set_full_fp32_param(parameter, state.weights[name])
            for key, moments in zip(_MOMENTS, (state.first_moments, state.second_moments), strict=True):
                safe_set_full_optimizer_state(parameter, moments[name], key)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        self.model.set_gradient_accumulation_boundary(last)
        # DeepSpeed averages over the processes; the step's gradient is their sum.
        self.model.backward(loss * self._process_group.size, scale_wrt_gas=False)

    def step(self, learning_rate: float) -> float:
        for group in self.model.optimizer.param_groups:
            group["lr"] = learning_rate
        self.model.step()
        return float(self.model.get_global_grad_norm())

    def zero_grad(self) -> None:
        """Does nothing: `step` has cleared the gradients."""

    @torch.no_grad()
    def state(self) -> OptimizerState:
        """Returns float32 copies on the CPU."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        return OptimizerState(
            {name: safe_get_full_fp32_param(each).cpu() for name, each in self.weights.items()},
            *(
                {name: safe_get_full_optimizer_state(each, key).cpu() for name, each in self.weights.items()}
                for key in _MOMENTS
            ),
        )

    def _create_moments(self, step: int) -> None:
        """Creates AdamW's state after `step` steps: DeepSpeed itself creates it only in its first step."""
        optimizer = self.model.optimizer
        inner = optimizer.optimizer
        counted = isinstance(inner, torch.optim.AdamW)  # torch counts steps in a tensor, DeepSpeed in a number
        third = hasattr(optimizer, "fp32_partitioned_groups_flat")  # ZeRO stage 3
        for flat in optimizer.fp32_partitioned_groups_flat if third else optimizer.single_partition_of_fp32_groups:
            inner.state[flat] = {"step": torch.tensor(float(step)) if counted else step}
            inner.state[flat] |= {key: torch.zeros_like(flat) for key in _MOMENTS}
        if not third:
            optimizer._lazy_init_hp_params_optimizer_state()


@contextmanager
def zero_optimizer(
    model: PreTrainedModel, spec: JobSpec, device: torch.device, process_group: ProcessGroup
) -> Iterator[ZeroOptimizer]:
    """Puts `model` under DeepSpeed; afterwards the process is as before.

    Args:
        model: on the CPU, and used for nothing else.
        device: where the model computes.
        process_group: of an initialized `torch.distributed`, which a single process does not need.

    Raises:
        SetupError: DeepSpeed can't build its CPU optimizer.
    """
    with _import_deepspeed(device) as deepspeed, _single_process_group(device):
        offloading = spec.offload != "none"
        if spec.offload == "all":
            deepspeed.zero.Init(module=model, config_dict_or_path=_config(model, spec, device, process_group))
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=_torch_optimizer(model, spec, on_host=offloading and device.type == "cuda"),
            config=_config(model, spec, device, process_group),
            dist_init_required=False,
        )
        try:
            yield ZeroOptimizer(engine, process_group)
        finally:
            engine.destroy()


def _config(model: PreTrainedModel, spec: JobSpec, device: torch.device, process_group: ProcessGroup) -> dict[str, Any]:
    host = {"device": "cpu", "pin_memory": device.type == "cuda"}
    stage: dict[str, Any] = {
        "stage": 3 if spec.offload == "all" else 2,
        "reduce_bucket_size": _BUCKET_ELEMENTS,
        "allgather_bucket_size": _BUCKET_ELEMENTS,
        "overlap_comm": False,
    }
    if spec.offload != "none":
        stage["offload_optimizer"] = host
    if spec.offload == "all":
        stage["offload_param"] = host
    return {
        "train_micro_batch_size_per_gpu": 1,
        # Any number above 1 makes DeepSpeed accumulate gradients; `backward` marks the end of a step.
        "gradient_accumulation_steps": 2,
        "gradient_clipping": spec.max_grad_norm,
        "bf16": {"enabled": model.dtype == torch.bfloat16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": stage,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }


def _torch_optimizer(model: PreTrainedModel, spec: JobSpec, *, on_host: bool) -> torch.optim.Optimizer:
    if not on_host:
        # Nothing is compiled, and on the CPU torch's is as fast.
        return torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=spec.weight_decay, fused=True)
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    log.info("DeepSpeed builds its AdamW for this CPU, which takes a minute or two the first time on a machine")
    try:
        optimizer: torch.optim.Optimizer = DeepSpeedCPUAdam(model.parameters(), lr=0.0, weight_decay=spec.weight_decay)
    except RuntimeError as error:
        raise SetupError(
            f"DeepSpeed could not build its optimizer for the host ({error.__cause__ or error}): install a C++ "
            "compiler and ninja, or use offload='none' if the job fits the GPU without offloading."
        ) from error
    return optimizer


@contextmanager
def _import_deepspeed(device: torch.device) -> Iterator[Any]:
    """Imports DeepSpeed for this device; afterwards DeepSpeed, torch and the environment are as before."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator, set_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    # It takes half a minute to compile, and makes the sums of several processes on one CPU only a little faster.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    guess, ranked = get_accelerator(), "LOCAL_RANK" in os.environ
    linear = nn.functional.linear  # stage 3 replaces it, and would leave the replacement to all later models
    if device.type == "cpu" != guess.device_name():
        set_accelerator(CPU_Accelerator())
    os.environ.setdefault("LOCAL_RANK", "0")
    try:
        yield deepspeed
    finally:
        nn.functional.linear = linear
        set_accelerator(guess)
        if not ranked:
            del os.environ["LOCAL_RANK"]


@contextmanager
def _single_process_group(device: torch.device) -> Iterator[None]:
    """Within, `torch.distributed` is initialized: with this process alone, unless it already was."""
    from deepspeed.comm import comm

    alone = not distributed.is_initialized()
    if alone:
        backend = "nccl" if device.type == "cuda" else "gloo"
        store = distributed.HashStore()  # type: ignore[attr-defined]  # exported, though not in __all__
        distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        if alone:
            comm.destroy_process_group()
        comm.cdb = None  # else DeepSpeed would use the destroyed group
