"""The inference engine: continuous batching with paged KV and an adapter a request.

Knows nothing of HTTP, Ray or text, and imports with torch, numpy and safetensors alone.
"""

from loramill.serve.engine.engine import Engine
from loramill.serve.engine.types import (
    AdapterSource,
    EngineConfig,
    EngineStats,
    FinishReason,
    Output,
    Request,
    TokenLogprobs,
    TokenMask,
)
from loramill.serve.sampling_params import SamplingParams

__all__ = [
    "AdapterSource",
    "Engine",
    "EngineConfig",
    "EngineStats",
    "FinishReason",
    "Output",
    "Request",
    "SamplingParams",
    "TokenLogprobs",
    "TokenMask",
]
