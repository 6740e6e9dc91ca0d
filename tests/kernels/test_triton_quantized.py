"""Quantized weights on a real GPU; without one, triton_quantized_interpreted.py covers the same products."""

import pytest
import torch

from loramill.gpus import FP8_CAPABILITY
from loramill.kernels.quantization import concatenate, dequantize, pack_nf4, quantize, unpack_nf4

pytestmark = pytest.mark.gpu

#: Norms of errors relative to the result: of a rounding of y and of NF4's scales to bfloat16; in float8, of x.
LIMITS = {"nf4": 0.01, "int8": 0.01, "fp8": 0.04}
KINDS = [
    kind
    for kind in LIMITS
    if kind != "fp8" or not torch.cuda.is_available() or torch.cuda.get_device_capability() >= FP8_CAPABILITY
]


@pytest.fixture
def triton():
    pytest.importorskip("triton")
    from loramill.kernels import triton

    return triton


def fused(kind, d_in, *widths):
    return concatenate([quantize(torch.randn(width, d_in, device="cuda") / d_in**0.5, kind) for width in widths])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("d_in", "widths"), [(4096, (4096, 1024, 1024)), (576, (1536, 1536)), (1536, (576,))])
def test_products_on_this_gpu_called_and_replayed(triton, kind, d_in, widths):
    from loramill_bench.kernels.cuda import captured

    matrix = fused(kind, d_in, *widths)
    packed, values = triton.pack_quantized(matrix, torch.bfloat16), matrix.values(torch.float32)
    assert packed.codebook is not None
    for rows in (1, 3, 4, 17, 64, 100, 256, 300, 2000):
        x = torch.randn(rows, d_in + 16, device="cuda").bfloat16()[:, 8 : 8 + d_in]
        expected, results = x.float() @ values.T, []
        called = triton.linear(x, packed)
        captured(lambda x=x, results=results: results.append(triton.linear(x, packed))).replay()
        assert torch.equal(results[-1], called), rows
        assert (called.float() - expected).norm() < LIMITS[kind] * expected.norm(), rows


@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_stays_in_its_row(triton, kind):
    packed = triton.pack_quantized(fused(kind, 512, 256), torch.bfloat16)
    for rows in (2, 9, 70):
        x = torch.randn(rows, 512, device="cuda").bfloat16()
        clean = triton.linear(x, packed)
        x[1, 3] = torch.nan
        wrong = triton.linear(x, packed)
        others = torch.arange(rows, device="cuda") != 1
        assert wrong[1].isnan().all() and torch.equal(wrong[others], clean[others])


def test_a_product_launches_without_waiting_for_the_device(triton):
    matrices = {kind: triton.pack_quantized(fused(kind, 512, 256), torch.bfloat16) for kind in KINDS}
    x = torch.randn(7, 512, device="cuda").bfloat16()
    for packed in matrices.values():
        triton.linear(x, packed)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for packed in matrices.values():
            triton.linear(x, packed)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_nf4_has_the_cpus_codes_but_for_ties():
    weight = torch.randn(1024, 4096).bfloat16()
    on_cpu, on_gpu = pack_nf4(weight), pack_nf4(weight.cuda())
    assert (on_cpu.codes != on_gpu.codes.cpu()).float().mean() < 1e-5
    values = [dequantize(unpack_nf4(packed), torch.float32).cpu() for packed in (on_cpu, on_gpu)]
    assert (values[0] - values[1]).norm() < 1e-3 * values[0].norm()


def test_nf4_from_the_disk_is_on_the_gpu(tmp_path):
    from loramill.models.nf4_cache import Nf4Cache

    weight = torch.randn(64, 128, device="cuda")
    for _ in range(2):
        packed = Nf4Cache(tmp_path, "f" * 64, torch.device("cuda")).pack("q_proj", lambda: weight)
        assert packed.codes.is_cuda
        assert torch.equal(packed.codes, pack_nf4(weight).codes)
        assert unpack_nf4(packed).scales.is_cuda
