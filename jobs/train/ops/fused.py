"""The elementwise layers of a base on a GPU, one launch each: RMS norm, gated product of an MLP, and rotary positions.

Liger-Kernel has the same operations. They are not used here, for four reasons: its norm also computes the gradient of
the weight, which is frozen here, by a sum over the rows; its gated product and its rotation overwrite their saved
inputs; it patches a model's classes for the whole process, and so for other models; and its rotation does not round
where transformers does. The results here equal those of transformers within 1e-6 in float32; in bfloat16 they are
rounded at the same places.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton
from torch.autograd.function import once_differentiable

from loramill.jobs.train.ops import fused_kernels as kernels

#: Elements of a tile of the norm: rows of heads (64 to 256 wide) share a program, as one row would leave most of its
#: threads idle.
NORM_ELEMENTS = 2048
#: Elements and warps per program of the gated product: 16 bytes of bfloat16 per thread and tensor.
GATED_ELEMENTS, GATED_WARPS = 1024, 4
#: Pairs of elements, and warps, per program of the rotation.
ROTATED_PAIRS, ROTATE_WARPS = 1024, 4


class _RmsNorm(torch.autograd.Function):
    """x / sqrt(mean x^2 + eps) * w (Zhang & Sennrich 2019, arXiv 1910.07467); keeps x alone for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, plus_one: bool) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.plus_one = eps, plus_one
        rows, y = _rows(x), torch.empty(x.shape, dtype=x.dtype, device=x.device)
        tile, options = norm_tile(x.shape[-1])
        grid = (triton.cdiv(len(rows), tile["ROWS"]),)
        launch(
            kernels.norm_forward, grid, rows, weight, y, len(rows), rows.stride(0), eps,
            **tile, PLUS_ONE=plus_one, **options,
        )  # fmt: skip
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows, back = _rows(x), _rows(d_y)
        d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        tile, options = norm_tile(x.shape[-1])
        grid = (triton.cdiv(len(rows), tile["ROWS"]),)
        launch(
            kernels.norm_backward, grid, rows, weight, back, d_x, len(rows), rows.stride(0), back.stride(0), ctx.eps,
            **tile, PLUS_ONE=ctx.plus_one, **options,
        )  # fmt: skip
        return d_x, None, None, None


class _Gated(torch.autograd.Function):
    """act(gate) * up; keeps gate and up, and computes the activation again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, gelu: bool) -> torch.Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        ctx.gelu = gelu
        y = torch.empty_like(gate)
        _launch_gated(kernels.gated_forward, gate, up, y, gelu=gelu)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
        _launch_gated(kernels.gated_backward, gate, up, d_y.contiguous(), d_gate, d_up, gelu=ctx.gelu)
        return d_gate, d_up, None


class _Rotary(torch.autograd.Function):
    """Rotary positions (Su et al. 2021, arXiv 2104.09864); the gradient is the rotation back, and keeps no q and k."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(cos, sin)
        return _rotated(q, k, cos, sin, inverse=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_q: torch.Tensor, d_k: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *_rotated(d_q, d_k, *ctx.saved_tensors, inverse=True), None, None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, *, plus_one: bool) -> torch.Tensor:
    """An RMS norm over the last axis, with a gradient in x alone.

    Args:
        x: [..., d].
        weight: [d], frozen, of x's dtype.
        plus_one: multiply by 1 + weight in float32, as Gemma does; else by the weight in x's dtype.
    """
    y: torch.Tensor = _RmsNorm.apply(x, weight, eps, plus_one)  # type: ignore[no-untyped-call]
    return y


def gated_mlp(module: Any, x: torch.Tensor, *, gelu: bool) -> torch.Tensor:
    """The MLP of a Llama-like model of transformers: down_proj(act(gate_proj(x)) * up_proj(x)).

    Args:
        module: an `nn.Module` with these three linears.
        gelu: whether the activation is GELU in its tanh approximation; else it is SiLU.
    """
    product = _Gated.apply(module.gate_proj(x), module.up_proj(x), gelu)  # type: ignore[no-untyped-call]
    y: torch.Tensor = module.down_proj(product)
    return y


def apply_rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers' `apply_rotary_pos_emb`.

    Args:
        q: [rows, heads, tokens, d]; a transposed [rows, tokens, heads, d], as the results are, needs no copy.
        k: [rows, kv_heads, tokens, d], likewise.
        cos, sin: [rows or 1, tokens, d] of q's dtype; the two halves of the last axis are equal.
    """
    turned: tuple[torch.Tensor, torch.Tensor] = _Rotary.apply(q, k, cos, sin)  # type: ignore[no-untyped-call]
    return turned


def launch_once(device: torch.device) -> None:
    """Launches one small kernel, for which Triton has to compile its launcher.

    Raises:
        RuntimeError, CalledProcessError, OSError: the compilation failed, for example without a C compiler.
    """
    one = torch.ones(1, device=device)
    _launch_gated(kernels.gated_forward, one, one, torch.empty_like(one), gelu=False)


def norm_tile(width: int) -> tuple[dict[str, int], dict[str, int]]:
    """The constants and the launch options of the norm's kernels for rows of this width."""
    columns = triton.next_power_of_2(width)
    rows = max(1, NORM_ELEMENTS // columns)
    # 16 elements per thread; more of them would not fit the registers of the backward pass.
    warps = min(32, max(4, rows * columns // 512))
    return {"WIDTH": width, "COLUMNS": columns, "ROWS": rows}, {"num_warps": warps}


def rotation_block(half: int) -> dict[str, int]:
    """The constants BLOCK and COLUMNS of `rotate` for heads of `half` pairs."""
    columns = triton.next_power_of_2(half)
    return {"BLOCK": max(1, ROTATED_PAIRS // columns), "COLUMNS": columns}


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Launches a kernel on the device of its first argument, which need not be torch's current one."""
    if 0 in grid:
        return
    device = args[0].device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*args, **constants)


def _launch_gated(kernel: Any, *tensors: torch.Tensor, gelu: bool) -> None:
    count = tensors[0].numel()
    grid = (triton.cdiv(count, GATED_ELEMENTS),)
    launch(kernel, grid, *tensors, count, SIZE=GATED_ELEMENTS, GELU=gelu, num_warps=GATED_WARPS)


def _rotated(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, inverse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    q, k = (each.transpose(1, 2).contiguous() for each in (q, k))
    rows, tokens, heads, width = q.shape
    out = torch.empty_like(q), torch.empty_like(k)
    block = rotation_block(width // 2)
    blocks = sum(triton.cdiv(count, block["BLOCK"]) for count in (heads, k.shape[2]))
    launch(
        kernels.rotate, (rows * tokens, blocks), q, k, cos.contiguous(), sin.contiguous(), *out, len(cos) * tokens,
        HEADS=heads, KV_HEADS=k.shape[2], HALF=width // 2, INVERSE=inverse, num_warps=ROTATE_WARPS, **block,
    )  # fmt: skip
    return out[0].transpose(1, 2), out[1].transpose(1, 2)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[..., d] as [rows, d] with adjacent elements in a row; a view if possible."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()
