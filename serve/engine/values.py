"""What goes into the engine and what comes out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Literal

from loramill.errors import LoramillError, SettingsInvalid

#: From a version's hash to a local PEFT folder. Called in the engine's side threads, so it may block and must be
#: thread-safe; what it raises reaches the requests that wait for the version.
AdapterSource = Callable[[str], Path]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        max_tokens: at most so many; capped to what fits the context.
        temperature: 0 takes the likeliest token.
        top_p: of the likeliest tokens as many as hold this share of the probability.
        top_k: of the likeliest tokens so many; 0 for all.
        seed: the same seed gives the same tokens, whatever else is in the batch; None: another each time.
        stop_ids: tokens that end the answer, and aren't part of it.
        logprobs: report each token's log probability and that of so many likeliest (0 to 20); None: don't.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop_ids: tuple[int, ...] = ()
    logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """Prompt tokens to go on from, for a tenant, by a version of an adapter (None: the base alone)."""

    id: str
    tenant: str
    tokens: tuple[int, ...]
    sampling: Sampling
    version: str | None = None


class Finish(StrEnum):
    """Why a request got its last output."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural log probabilities, before temperature: of the chosen token, and of the likeliest, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Output:
    """New tokens of a request; the last one of a request has `finish`, and `error` if that is ERROR."""

    request: str
    tokens: tuple[int, ...]
    finish: Finish | None = None
    error: LoramillError | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Limits of one engine.

    Attributes:
        max_batch_tokens: tokens of one step.
        max_sequences: requests that run at once.
        kv_tokens: tokens of KV cache, rounded down to whole blocks.
        block_size: tokens of one block.
        adapter_slots: adapters resident at once.
        adapter_bytes: what they may take together.
        adapter_bits: 16 keeps them in the base's own type; 8 halves their memory and the time that many different ones
            take in a step, and errs by about 1% of what an adapter adds.
        max_waiting: requests that may wait; more are refused.
        load_threads: adapters that are fetched and read at once.
        patience: steps that a version waits for a slot before one is taken from a version in use.
    """

    max_batch_tokens: int = 512
    max_sequences: int = 64
    kv_tokens: int = 32768
    block_size: int = 16
    adapter_slots: int = 64
    adapter_bytes: int = 1 << 30
    adapter_bits: Literal[16, 8] = 16
    max_waiting: int = 1024
    load_threads: int = 4
    patience: int = 64

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if getattr(self, name) < 1:
                raise SettingsInvalid(f"The engine's {name} is {getattr(self, name)}; it must be at least 1.")
        if self.block_size % 16:
            raise SettingsInvalid(f"The engine's block_size is {self.block_size}; it must be a multiple of 16.")
        if self.kv_tokens < self.block_size:
            raise SettingsInvalid(f"The engine's kv_tokens ({self.kv_tokens}) don't hold a block of {self.block_size}.")


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A look at the engine after its last step.

    Attributes:
        waiting: requests not yet running, those that wait for their adapter included.
        running: requests in the batch.
        blocks, free_blocks: of the KV cache.
        resident: versions in slots, ready to use.
        loading: versions being fetched.
        adapter_bytes: of the resident adapters.
        steps, generated_tokens, preemptions, loads, load_failures: since the start.
        computed_tokens: rows that passed the decoder since the start, prompts and answers.
    """

    waiting: int = 0
    running: int = 0
    blocks: int = 0
    free_blocks: int = 0
    resident: tuple[str, ...] = ()
    loading: tuple[str, ...] = ()
    adapter_bytes: int = 0
    steps: int = 0
    computed_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    loads: int = 0
    load_failures: int = 0
