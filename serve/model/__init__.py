"""The decoder of the Llama family over paged KV, with adapters at every linear. Imports with torch and safetensors."""

from loramill.serve.model.config import DecoderConfig, read_config
from loramill.serve.model.decoder import Chunk, Decoder
from loramill.serve.model.loading import load_decoder

__all__ = ["Chunk", "Decoder", "DecoderConfig", "load_decoder", "read_config"]
