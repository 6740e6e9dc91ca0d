"""Products with quantized weights by the Triton backend; test_triton.py runs this under the interpreter.

bfloat16 is left to the kernels without `tl.dot`: the interpreter multiplies its bits as integers there. bitsandbytes
and torch have `gemm_4bit` and `_scaled_mm` for CPUs, too, with the same definitions.
"""

import importlib

import pytest
import torch
import torch.nn.functional as F
import triton.language as tl
from bitsandbytes import functional
from triton.runtime import interpreter

from loramill.errors import EngineFault
from loramill.kernels import Batch, Quantized, reference, torch_backend, triton
from loramill.kernels.quantization import concatenate, pack_nf4, quantize, unpack_nf4
from loramill.serve.model import Chunk, load_decoder, loading

from ..llama import tiny_llama, write_base
from ..triton_interpreter import fast_interpreter, interpreter_ranges, nan_in_fresh_memory  # noqa: F401

quantized = importlib.import_module("loramill.kernels.triton.quantized")
kernels = importlib.import_module("loramill.kernels.triton.quantized_kernels")

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

#: Unit roundoff of float8_e4m3fn, and half its smallest number.
FP8_UNIT, FP8_HALF_SMALLEST = 2**-4, 2**-10
ROWS = (1, 7, 33, 70)
NF4 = functional.get_4bit_type("nf4", "cpu")


@pytest.fixture(autouse=True)
def float8_of_torch(monkeypatch):
    """Triton 3.7's interpreter rounds 127 to 64 in float8, and loses NaN; GPUs convert as torch does."""
    convert = interpreter._convert_float

    def converted(data, source, target, rounding):
        if target == tl.float8e4nv:
            return torch.from_numpy(data).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        return convert(data, source, target, rounding)

    monkeypatch.setattr(interpreter, "_convert_float", converted)


def strided(rows, d_in, dtype=torch.float32):
    return torch.randn(rows, d_in + 8).to(dtype)[:, 4 : 4 + d_in]


@pytest.mark.parametrize(("d_out", "d_in"), [(45, 100), (96, 512), (2, 37)])
def test_int8_products_are_those_of_the_rounded_values(d_out, d_in):
    matrix = quantize(torch.randn(d_out, d_in), "int8")
    packed = triton.pack_quantized(matrix, torch.float32)
    assert packed.data.dtype == torch.int8
    for rows in ROWS:
        x = strided(rows, d_in)
        expected = (x.double() @ matrix.values(torch.float64).T).float()
        torch.testing.assert_close(triton.linear(x, packed), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_with_many_rows_has_the_bits_of_the_rounded_values(dtype):
    matrix = quantize(torch.randn(24, 64), "int8")
    x = torch.randn(quantized.INT8_ROWS + 1, 64).to(dtype)
    assert torch.equal(triton.linear(x, triton.pack_quantized(matrix, dtype)), F.linear(x, matrix.values(dtype)))


def test_a_nan_in_int8_stays_in_its_row_and_its_output():
    matrix, x = quantize(torch.randn(40, 64), "int8"), torch.randn(5, 64)
    clean = triton.linear(x, triton.pack_quantized(matrix, torch.float32))
    matrix.scales[3], x[2, 7] = torch.nan, torch.nan
    wrong = triton.linear(x, triton.pack_quantized(matrix, torch.float32))
    touched = torch.zeros(5, 40, dtype=torch.bool)
    touched[2], touched[:, 3] = True, True
    assert wrong[touched].isnan().all() and torch.equal(wrong[~touched], clean[~touched])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("d_in", [64, 5000])
def test_rows_are_rounded_to_float8_as_weights_are(dtype, d_in):
    x = strided(6, d_in, dtype)
    x[1] *= 1e4
    x[2] = 0
    x[3, 5] = torch.nan
    x[4, 1] = torch.inf
    codes, scales = torch.empty(6, d_in, dtype=torch.float8_e4m3fn), torch.empty(6, 1)
    kernels.quantize_rows[6,](x, codes, scales, d_in, x.stride(0), **quantized.FP8_LAUNCH.constants)
    finite = [0, 1, 2, 5]
    expected = quantize(x[finite], "fp8")
    torch.testing.assert_close(scales[finite], expected.scales, rtol=1e-6, atol=0)
    assert torch.equal(codes[finite].float(), expected.codes.float())
    assert codes.float()[3, 5].isnan() and (codes.float() * scales)[4, 1].isnan()
    assert codes.float()[3].isfinite().sum() == d_in - 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float8_products_err_by_the_rounding_of_their_factors(dtype):
    weight, x = torch.randn(48, 320) * torch.rand(48, 1), strided(9, 320, dtype)
    matrix = quantize(weight, "fp8")
    packed = triton.pack_quantized(matrix, dtype)
    assert packed.data.dtype == torch.float8_e4m3fn
    y = triton.linear(x, packed)
    assert y.dtype == dtype
    exact, size = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    # Each factor is rounded once; subnormals of a row have an absolute error.
    of_x = FP8_HALF_SMALLEST * x.double().abs().amax(1, keepdim=True) / 448 * weight.double().abs().sum(1)
    of_weight = FP8_HALF_SMALLEST * matrix.scales.double().T * x.double().abs().sum(1, keepdim=True)
    bound = (2 * FP8_UNIT + FP8_UNIT**2 + 2**-8) * size + 1.1 * (of_x + of_weight)
    error = (y.double() - exact).abs()
    assert (error <= bound).all()
    # Errors of random signs mostly cancel each other: 2.6% of each factor.
    assert 0.02 < error.norm() / exact.norm() < 0.05


def test_a_nan_in_float8_stays_in_its_row():
    packed, x = triton.pack_quantized(quantize(torch.randn(32, 64), "fp8"), torch.float32), torch.randn(5, 64)
    clean = triton.linear(x, packed)
    x[2, 7] = torch.nan
    wrong = triton.linear(x, packed)
    others = [0, 1, 3, 4]
    assert wrong[2].isnan().all() and torch.equal(wrong[others], clean[others])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_products_use_the_packed_codes_of_training_in_one_call(dtype, monkeypatch):
    weights = [torch.randn(width, 192).bfloat16() for width in (64, 16, 48)]
    parts = [pack_nf4(weight) for weight in weights]
    matrix = concatenate([unpack_nf4(part) for part in parts])
    packed = triton.pack_quantized(matrix, dtype)
    assert torch.equal(packed.data.flatten(), torch.cat([part.codes.flatten() for part in parts]))
    assert packed.codebook.scales.dtype == torch.float32
    calls, gemm = [], torch.ops.bitsandbytes.gemm_4bit
    monkeypatch.setattr(torch.ops.bitsandbytes, "gemm_4bit", lambda *args: calls.append(args) or gemm(*args))
    for rows in ROWS:
        x = strided(rows, 192, dtype)
        assert torch.equal(triton.linear(x, packed), F.linear(x, matrix.values(dtype)))
    assert len(calls) == len(ROWS)
    trained = [functional.dequantize_4bit(part.codes, part.state) for part in parts]
    assert torch.equal(triton.embed(torch.arange(128), packed).bfloat16(), torch.cat(trained))


@pytest.mark.parametrize(
    ("matrix", "fits"),
    [
        (unpack_nf4(pack_nf4(torch.randn(6, 64))), True),
        (unpack_nf4(pack_nf4(torch.randn(7, 64))), False),  # an odd number of outputs
        (Quantized(torch.randint(16, (8, 48), dtype=torch.uint8), NF4, torch.ones(8, 1)), False),  # blocks of 48
        (Quantized(torch.randint(9, (8, 64), dtype=torch.int8), None, torch.ones(8, 2)), False),  # a scale per half row
        (quantize(torch.randn(32, 48), "fp8"), True),
        (quantize(torch.randn(32, 40), "fp8"), False),
        (quantize(torch.randn(20, 48), "fp8"), False),
    ],
    ids=lambda value: "" if isinstance(value, bool) else f"{value.codes.dtype}{list(value.codes.shape)}",
)  # fmt: skip
def test_a_shape_without_a_product_is_kept_as_its_values(matrix, fits):
    packed = triton.pack_quantized(matrix, torch.float32)
    assert (packed.codebook is not None) == fits
    x = torch.randn(3, matrix.codes.shape[1])
    if matrix.codes.dtype != torch.float8_e4m3fn or not fits:
        plain = reference.linear(x, reference.pack_quantized(matrix, torch.float32))
        torch.testing.assert_close(triton.linear(x, packed), plain, rtol=1e-5, atol=1e-5)
    assert torch.equal(triton.embed(torch.tensor([1, 5]), packed), matrix.values(torch.float32)[[1, 5]])


def test_other_levels_than_those_of_the_kernels_are_refused():
    matrix = Quantized(torch.randint(16, (8, 64), dtype=torch.uint8), torch.randn(16), torch.ones(8, 1))
    with pytest.raises(EngineFault, match="not those of NF4"):
        triton.pack_quantized(matrix, torch.float32)


@pytest.mark.parametrize(("kind", "error"), [("nf4", 1e-5), ("int8", 1e-5), ("fp8", 0.1)])
def test_a_base_is_served_quantized(tmp_path, monkeypatch, kind, error):
    base, prompt = write_base(tmp_path, tiny_llama(hidden_size=64, intermediate_size=128)), list(range(1, 20))
    monkeypatch.setattr(loading, "_check_fp8", lambda device: None)

    def logits(backend):
        monkeypatch.setattr(loading, "backend", lambda *_: backend)
        decoder = load_decoder(base, dtype=torch.float32, quantization=kind)
        assert decoder._weights.stack.layers[1].o.weight.codebook is not None
        cache, slab = decoder.new_cache(blocks=2, block_size=16), decoder.new_slab(1, 1 << 10)
        chunk = Chunk(prompt, 0, [0, 1], logits_to_keep=1)
        return decoder.forward([chunk], cache, slab, Batch.of([(None, len(prompt))]))[0]

    expected, got = logits(torch_backend), logits(triton)
    assert (got - expected).norm() < error * expected.norm()
