"""The backend for NVIDIA GPUs: Triton kernels for adapters and decode attention, torch operations for the rest."""

from loramill.kernels.torch_backend import add_rms_norm as add_rms_norm
from loramill.kernels.torch_backend import embed as embed
from loramill.kernels.torch_backend import linear as linear
from loramill.kernels.torch_backend import new_kv as new_kv
from loramill.kernels.torch_backend import pack as pack
from loramill.kernels.torch_backend import pack_quantized as pack_quantized
from loramill.kernels.torch_backend import rms_norm as rms_norm
from loramill.kernels.torch_backend import rope_write as rope_write
from loramill.kernels.torch_backend import set_threads as set_threads
from loramill.kernels.torch_backend import silu_mul as silu_mul
from loramill.kernels.triton.attention import StaticPages as StaticPages
from loramill.kernels.triton.attention import attention as attention
from loramill.kernels.triton.lora import StaticPlan as StaticPlan
from loramill.kernels.triton.lora import adapted_linear as adapted_linear
from loramill.kernels.triton.lora import layout as layout
from loramill.kernels.triton.lora import lora as lora

name: str = "triton"
