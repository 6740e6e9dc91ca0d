"""The limits of an engine by its device."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from itertools import accumulate
from typing import get_args

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from loramill.errors import NotEnoughMemory, SettingsInvalid
from loramill.gpus import CONTEXT_BYTES
from loramill.kernels.attention import paged
from loramill.serve.engine.sampling.device_sampler import DeviceSampler
from loramill.serve.engine.sampling.logprobs import SLICE_BYTES
from loramill.serve.engine.sampling.sampler import Sampler
from loramill.serve.sampling_params import SamplingParams
from loramill.settings import ServeSettings
from loramill.sizing import anatomy, serving
from loramill.sizing.anatomy import ExpertsShape, LinearShape, llama_of
from loramill.sizing.serving import (
    EngineLimits,
    cpu_limits,
    expected_speed,
    gpu_limits,
    kv_token_bytes,
    planned_limits,
    served_weight_bytes,
)
from loramill.types import GpuInfo, Quantization, ServedQuantization

H100 = GpuInfo(name="NVIDIA H100 80GB HBM3", bytes=79 << 30, capability=(9, 0))
L4 = GpuInfo(name="NVIDIA L4", bytes=22 << 30, capability=(8, 9))
LLAMA = anatomy(llama_of(8))
HOST = 64 << 30


def peak_bytes(run: Callable[[], object]) -> tuple[int, int]:
    """The most that a function had allocated on the CPU, and what it leaves."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    changes = [event.nbytes() for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(changes)), sum(changes)


def test_sampling_takes_what_is_left_for_it() -> None:
    rows, at_once, vocabulary = 16, 8, 1 << 15
    params = SamplingParams(temperature=1.0, top_p=0.9, top_k=50, min_p=0.01, repetition_penalty=1.1)
    logits, samplers = torch.randn(rows, vocabulary), [Sampler(params, (1,), index) for index in range(rows)]
    sampler = DeviceSampler(vocabulary, torch.device("cpu"))
    sampler._rows_at_once = at_once
    _, table = peak_bytes(lambda: sampler.sample(logits, samplers))
    peak, _ = peak_bytes(lambda: sampler.sample(logits, samplers))
    bound = serving._SAMPLING * at_once * vocabulary
    assert 0.9 * bound < peak < bound
    assert table < 1.01 * serving._SHIFTS * rows * vocabulary
    assert serving._SAMPLED_AT_ONCE * 8 == SLICE_BYTES
    assert serving._GATHERED == paged.GATHERED


def test_a_step_leaves_room_for_sampling_and_gathered_prompts() -> None:
    def step_bytes(sequences: int, **changes: int) -> int:
        return serving._step_bytes(dataclasses.replace(LLAMA, **changes), "none", 16, sequences, 60 << 30)

    # Short prompts are gathered together; one with more keys and values than 256 MiB is gathered alone.
    short, long = step_bytes(0, context=1 << 10), step_bytes(0, context=1 << 17)
    assert short - (576 << 20) == pytest.approx(256 << 20, rel=0.02)
    assert long - short == 256 << 20
    # 64 rows of 128,256 logits, and a table of 9 bytes per logit.
    table = 9 * LLAMA.vocabulary
    assert step_bytes(64, context=1 << 10) - 64 * table - (576 << 20) == pytest.approx(0.5e9, rel=0.05)
    # Rows beyond 8 Mi logits are sampled one part after the other.
    assert step_bytes(512) - step_bytes(256) == 256 * table


def test_the_limits_of_a_cpu_do_not_depend_on_the_machine() -> None:
    assert cpu_limits(ServeSettings()) == EngineLimits(128, 16, 32768, 2**30, 2**28, 500.0)


@pytest.mark.parametrize("on_gpu", [False, True])
def test_what_the_settings_fix_is_kept(on_gpu: bool) -> None:
    fixed = {"max_batch_tokens": 64, "max_waiting": 3, "kv_tokens": 4096, "adapter_bytes": 2**21, "host_bytes": 0}
    settings = ServeSettings.model_validate(fixed)
    limits = planned_limits(H100, LLAMA, "none", settings, HOST) if on_gpu else cpu_limits(settings)
    assert {name: getattr(limits, name) for name in fixed} == fixed


@pytest.mark.parametrize("gpu", [H100, L4])
@pytest.mark.parametrize("share", [0.5, 0.9, 1.0])
@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_caches_and_weights_fit_the_engines_share(gpu: GpuInfo, share: float, quantization: Quantization) -> None:
    weights = served_weight_bytes(LLAMA, quantization)
    budget = share * gpu.bytes - CONTEXT_BYTES
    settings = ServeSettings(gpu_fraction=share)
    if weights > budget:
        with pytest.raises(NotEnoughMemory, match="quantize the base"):
            planned_limits(gpu, LLAMA, quantization, settings, HOST)
        return
    if budget - weights < 2.1e9:
        # Sampling from the logits of 64 answers alone takes 0.5 GB.
        with pytest.raises(NotEnoughMemory, match=r"2\.0 GB for the engine besides the base.* serve\.gpu_fraction"):
            planned_limits(gpu, LLAMA, quantization, settings, HOST)
        return
    limits = planned_limits(gpu, LLAMA, quantization, settings, HOST)
    used = weights + limits.adapter_bytes + limits.kv_tokens * kv_token_bytes(LLAMA)
    assert used + (1 << 29) + 12 * limits.max_batch_tokens * LLAMA.vocabulary / 2 < budget, "a step has room"
    assert limits.kv_tokens >= 512 and limits.kv_tokens % 16 == 0
    assert limits.adapter_bytes >= 84 << 20 and limits.max_waiting == 256
    assert limits.max_batch_tokens == 2048 or budget - weights < 12 << 30
    assert 2**28 <= limits.host_bytes <= HOST // 8


@pytest.mark.parametrize(("quantization", "per_weight"), [("none", 2), ("nf4", 0.5625), ("int8", 1), ("fp8", 1)])
def test_the_bytes_of_a_served_weight(quantization: ServedQuantization, per_weight: float) -> None:
    weights = sum(linear.weights for linear in LLAMA.linears)
    outputs = sum(linear.d_out for linear in LLAMA.linears) if per_weight == 1 else 0
    others = 2 * (LLAMA.parameters - weights)
    assert served_weight_bytes(LLAMA, quantization) == others + per_weight * weights + 4 * outputs


def test_linears_that_have_no_product_in_few_bits_count_as_they_are() -> None:
    linear = LinearShape("model.layers.0.self_attn.q_proj", 0, 40, 24)
    odd = dataclasses.replace(LLAMA, linears=(linear,), embedding_weights=0, other_weights=0)
    sizes = [served_weight_bytes(odd, quantization) for quantization in get_args(ServedQuantization)]
    assert sizes == [2 * 960, 960 + 4 * 24, 2 * 960, 2 * 960]


def test_experts_are_not_advised_to_be_quantized() -> None:
    mixture = dataclasses.replace(LLAMA, experts=ExpertsShape(1, 1, 1, 1, 1))
    for base, advice in ((LLAMA, 'base (quantization = "nf4", or serve.'), (mixture, "base (serve.quantization = ")):
        with pytest.raises(NotEnoughMemory, match=re.escape(advice)):
            planned_limits(L4, base, "none", ServeSettings(gpu_fraction=0.1), HOST)


def test_an_engine_in_float8_is_planned_by_its_settings() -> None:
    plain, fp8 = (planned_limits(L4, LLAMA, "none", ServeSettings(quantization=q), HOST) for q in (None, "fp8"))
    assert fp8.kv_tokens * kv_token_bytes(LLAMA) - plain.kv_tokens * kv_token_bytes(LLAMA) > 4 << 30
    assert fp8.tokens_per_second > 1.3 * plain.tokens_per_second
    with pytest.raises(SettingsInvalid, match='quantization is "nf4": unset one'):
        planned_limits(L4, LLAMA, "nf4", ServeSettings(quantization="fp8"), HOST)


def test_a_large_gpu_is_used() -> None:
    limits = planned_limits(H100, LLAMA, "none", ServeSettings(), HOST)
    assert limits.kv_tokens * kv_token_bytes(LLAMA) > 0.55 * H100.bytes
    assert limits.adapter_bytes > 64 * (84 << 20), "each slot can hold an adapter of rank 16"


def test_no_more_is_allocated_than_is_useful() -> None:
    small = anatomy(llama_of(1))
    limits = gpu_limits(H100, small, "none", ServeSettings(max_sequences=4), free_bytes=70 << 30, host_free_bytes=HOST)
    assert limits.kv_tokens == 2 * 4 * small.context
    assert limits.adapter_bytes < 4 << 30


def test_too_little_memory_is_refused_with_the_figures() -> None:
    with pytest.raises(NotEnoughMemory, match=r"NVIDIA L4 has 1\.1 GB .* serve\.gpu_fraction"):
        gpu_limits(L4, LLAMA, "none", ServeSettings(), free_bytes=1 << 30, host_free_bytes=HOST)
    with pytest.raises(NotEnoughMemory, match=r"weights take 16\.1 GB, and the engine has 11\.8 GB of NVIDIA L4"):
        planned_limits(L4, LLAMA, "none", ServeSettings(gpu_fraction=0.5), HOST)


def test_the_expected_speed_follows_the_devices_memory() -> None:
    speeds = [expected_speed(gpu, LLAMA, "none", 64) for gpu in (L4, H100)]
    assert 400 < speeds[0] < 700 and 5000 < speeds[1] < 7000
    assert expected_speed(H100, LLAMA, "nf4", 64) > speeds[1]
    other = GpuInfo(name="NVIDIA Something", bytes=1, capability=(9, 0))
    assert speeds[0] < expected_speed(other, LLAMA, "none", 64) < speeds[1]
