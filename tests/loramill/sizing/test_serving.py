"""The limits of an engine by its device."""

from __future__ import annotations

import dataclasses
from typing import get_args

import pytest

from loramill.errors import NotEnoughMemory, SettingsInvalid
from loramill.gpus import CONTEXT_BYTES
from loramill.settings import ServeSettings
from loramill.sizing import anatomy
from loramill.sizing.anatomy import LinearShape, llama_of
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
