"""The backend for NVIDIA GPUs: Triton kernels for all but the base's products and the attention of prompts."""

from loramill.kernels.torch_backend import grouped_linear as grouped_linear
from loramill.kernels.torch_backend import new_kv as new_kv
from loramill.kernels.torch_backend import pack as pack
from loramill.kernels.torch_backend import pack_experts as pack_experts
from loramill.kernels.torch_backend import set_threads as set_threads
from loramill.kernels.triton.attention import StaticPages as StaticPages
from loramill.kernels.triton.attention import attention as attention
from loramill.kernels.triton.compilation import parallel_compilation as parallel_compilation
from loramill.kernels.triton.decoder_ops import add_rms_norm as add_rms_norm
from loramill.kernels.triton.decoder_ops import gated_activation as gated_activation
from loramill.kernels.triton.decoder_ops import rms_norm as rms_norm
from loramill.kernels.triton.decoder_ops import rope_write as rope_write
from loramill.kernels.triton.embedding import adapt_embedding as adapt_embedding
from loramill.kernels.triton.lora import StaticPlan as StaticPlan
from loramill.kernels.triton.lora import adapted_linear as adapted_linear
from loramill.kernels.triton.lora import layout as layout
from loramill.kernels.triton.lora import lora as lora
from loramill.kernels.triton.quantized import embed as embed
from loramill.kernels.triton.quantized import linear as linear
from loramill.kernels.triton.quantized import pack_quantized as pack_quantized

name: str = "triton"
