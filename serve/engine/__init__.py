"""The inference engine: continuous batching with paged KV and one adapter per request.

It is independent of HTTP, Ray and text, and imports with torch, numpy and safetensors alone.
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
