"""A base's weights in few bits, against bitsandbytes itself."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from loramill.errors import EngineFault, SetupError
from loramill.kernels import Quantized
from loramill.kernels.quantization import concatenate, quantize

from ..llama import tiny_llama

functional = pytest.importorskip("bitsandbytes.functional")

DTYPES = [torch.float32, torch.bfloat16]


def values(rounded: Quantized | torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return rounded.to(dtype) if isinstance(rounded, torch.Tensor) else rounded.values(dtype)


def by_bitsandbytes(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    data, state = functional.quantize_4bit(weight.bfloat16(), blocksize=64, compress_statistics=True, quant_type="nf4")
    state.dtype = dtype
    return functional.dequantize_4bit(data, state).view(weight.shape)  # which it transposes for two weights


@settings(max_examples=40)
@given(
    d_out=st.integers(1, 70),
    d_in=st.one_of(st.integers(1, 100).map(lambda half: 2 * half), st.sampled_from([64, 128, 192, 576])),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    size=st.sampled_from([1e-6, 0.02, 1.0, 300.0]),
)
def test_nf4_has_the_bits_of_bitsandbytes(d_out, d_in, dtype, size):
    weight = (torch.randn(d_out, d_in) * size * torch.rand(d_out, 1)).to(dtype)
    rounded = quantize(weight, "nf4")
    assert isinstance(rounded, Quantized) == (d_in % 64 == 0)
    for kept in DTYPES:
        assert torch.equal(values(rounded, kept), by_bitsandbytes(weight, kept))


@pytest.mark.parametrize("hidden", [64, 48], ids=["whole blocks", "blocks across rows"])
def test_nf4_is_the_base_that_transformers_trains_on(tmp_path, hidden):
    plain = tiny_llama(hidden_size=hidden, intermediate_size=128, initializer_range=0.2)
    plain.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        dtype=torch.bfloat16,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
    )
    linears = [name for name, module in loaded.named_modules() if type(module).__name__ == "Linear4bit"]
    assert len(linears) == 2 * 7
    for name in linears:
        held = loaded.get_submodule(name).weight
        trained = functional.dequantize_4bit(held.data, held.quant_state)
        assert trained.dtype == torch.bfloat16
        ours = values(quantize(plain.get_submodule(name).weight.detach(), "nf4"), torch.bfloat16)
        assert torch.equal(ours, trained), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_int8_errs_by_half_a_step_at_most(dtype):
    weight = (torch.randn(70, 37) * torch.rand(70, 1)).to(dtype)
    weight[5] = 0
    rounded = quantize(weight, "int8")
    assert rounded.levels is None
    assert rounded.scales.shape == (70, 1)
    step = weight.float().abs().amax(dim=1, keepdim=True) / 127
    error = (rounded.values(torch.float32) - weight.float()).abs()
    assert (error <= step * 0.5001).all()
    assert torch.equal(rounded.values(torch.float32)[5], torch.zeros(37))
    assert (rounded.codes.int().abs().amax(dim=1) == 127).sum() == 69


def test_a_weight_of_nan_is_not_hidden():
    weight = torch.randn(3, 64)
    weight[1, 7] = torch.nan
    rounded = quantize(weight, "int8").values(torch.float32)
    assert rounded[1].isnan().all()
    assert rounded[[0, 2]].isfinite().all()


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_concatenated_modules_keep_their_values(kind):
    parts = [quantize(torch.randn(d_out, 128), kind) for d_out in (64, 7, 32)]
    joined = concatenate(parts)
    for dtype in DTYPES:
        assert torch.equal(joined.values(dtype), torch.cat([part.values(dtype) for part in parts]))


def test_modules_of_two_kinds_are_not_concatenated():
    with pytest.raises(EngineFault):
        concatenate([quantize(torch.randn(8, 64), "nf4"), quantize(torch.randn(8, 64), "int8")])


def test_without_bitsandbytes_only_nf4_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert isinstance(quantize(torch.randn(8, 64), "int8"), Quantized)
    with pytest.raises(SetupError, match="pip install bitsandbytes"):
        quantize(torch.randn(8, 64), "nf4")


def test_the_operators_of_gpus_have_the_signatures_that_were_read():
    """Read in bitsandbytes 0.50.2 (backends/cuda/ops.py) and torch 2.13 (ScaledBlas.cpp, RowwiseScaledMM.cu)."""
    assert str(torch.ops.bitsandbytes.gemm_4bit.default._schema) == (
        "bitsandbytes::gemm_4bit(Tensor A, Tensor B, int[] shapeB, Tensor absmax, int blocksize, str quant_type, "
        "Tensor? bias=None, Tensor? absmax_8bit=None, Tensor? absmax_code=None, Tensor? absmax_offset=None) -> Tensor"
    )
    assert str(torch.ops.aten._scaled_mm.default._schema) == (
        "aten::_scaled_mm(Tensor self, Tensor mat2, Tensor scale_a, Tensor scale_b, Tensor? bias=None, Tensor? "
        "scale_result=None, ScalarType? out_dtype=None, bool use_fast_accum=False) -> Tensor"
    )
