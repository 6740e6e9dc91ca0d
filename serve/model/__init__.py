"""Base models with a paged KV cache and adapters at every linear and embedding. Imports with torch and safetensors."""

from loramill.serve.model.config import DecoderConfig, read_config
from loramill.serve.model.decoder import Decoder
from loramill.serve.model.loading import load_decoder, load_model
from loramill.serve.model.protocol import Chunk, Model

__all__ = ["Chunk", "Decoder", "DecoderConfig", "Model", "load_decoder", "load_model", "read_config"]
