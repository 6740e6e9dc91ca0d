"""What goes into the engine and what comes out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from loramill.errors import LoramillError, SettingsInvalid
from loramill.serve.engine.durations import Durations
from loramill.serve.sampling_params import SamplingParams

#: From a version's hash to a local PEFT folder. Called in the engine's side threads, so it may block and must be
#: thread-safe; what it raises reaches the requests that wait for the version.
AdapterSource = Callable[[str], Path]


class TokenMask(Protocol):
    """Which tokens one answer may go on with, such as those of a grammar. Nothing here raises."""

    @property
    def finished(self) -> bool:
        """Whether nothing may follow; the answer ends here."""
        ...

    @property
    def error(self) -> LoramillError | None:
        """Why it can't go on; the answer ends with it."""
        ...

    def allowed(self) -> npt.NDArray[np.bool_]:
        """[vocabulary]: whether each token may come next, at least one. Stop tokens may where the answer may end."""
        ...

    def accept(self, token: int) -> None:
        """Notes that `token`, which isn't one that stops, is the answer's next."""
        ...


@dataclass(frozen=True, slots=True)
class Request:
    """Prompt tokens to go on from, for a tenant, by a version of an adapter (None: the base alone).

    Attributes:
        mask: makes the mask of each of its answers; None: all tokens may come.
        priority: higher runs first, and takes the place of lower where there is none.
        timeout: seconds from the submit after which it ends with DeadlineExceeded; None: never.
    """

    id: str
    tenant: str
    tokens: tuple[int, ...]
    sampling_params: SamplingParams
    version: str | None = None
    priority: int = 0
    timeout_seconds: float | None = None
    mask: Callable[[], TokenMask] | None = None


class FinishReason(StrEnum):
    """Why a request got its last output."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural log probabilities, before penalties and temperature: of the token, and of the likeliest, best first.

    An echoed prompt's first token has no log probability: nothing comes before it.
    """

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Output:
    """New tokens of a request's answer `index`; its last has `finish`, and `error` if that is ERROR."""

    request_id: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason | None = None
    error: LoramillError | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    index: int = 0


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Limits of one engine.

    Attributes:
        max_batch_tokens: tokens of one step; on a CPU more make answers come in larger jerks, and no faster.
        max_sequences: requests that run at once.
        kv_tokens: tokens of KV cache, rounded down to whole blocks.
        prefix_cache: whether prompts that begin alike, under one version, share what was computed.
        block_size: tokens of one block.
        adapter_slots: adapters resident at once.
        adapter_bytes: what they may take together.
        host_bytes: what adapters may take that were read and lost their slot; 0 reads them anew.
        rank_budget: the ranks of the different adapters of one step sum up to this at most; one adapter always runs.
        adapter_bits: 16 keeps them in the base's own type; 8 halves their memory and the time that many different ones
            take in a step, and errs by about 1% of what an adapter adds.
        max_waiting: requests that may wait besides those that may run; beyond them a newcomer is refused, or takes the
            place of the newest of a tenant that has more of them waiting.
        load_threads: adapters that are fetched and read at once.
        patience: steps that a version waits for a slot before one is taken from a version in use.
    """

    max_batch_tokens: int = 128
    max_sequences: int = 64
    kv_tokens: int = 32768
    prefix_cache: bool = True
    block_size: int = 16
    adapter_slots: int = 64
    adapter_bytes: int = 1 << 30
    host_bytes: int = 1 << 28
    rank_budget: int = 1024
    adapter_bits: Literal[16, 8] = 16
    max_waiting: int = 1024
    load_threads: int = 4
    slot_patience_steps: int = 64

    def __post_init__(self) -> None:
        for name in self.__slots__:
            least = 0 if name in ("prefix_cache", "host_bytes") else 1
            if getattr(self, name) < least:
                raise SettingsInvalid(f"The engine's {name} is {getattr(self, name)}; it must be at least {least}.")
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
        pending_tokens: to be computed for both, of prompts and, as a guess, of answers.
        blocks, free_blocks: of the KV cache.
        slots: of adapters.
        resident: versions in slots, ready to use.
        loading: versions being fetched.
        adapter_bytes: of the resident adapters.
        host_bytes: of the adapters that were read and may have no slot.
        steps, generated_tokens, preemptions, loads, load_failures, evictions: since the start.
        computed_tokens: rows that passed the decoder since the start, prompts and answers.
        reused_tokens: rows that the prefix cache spared.
        waits: of answers, from the submit until they first ran.
        step_times: of steps that ran the model.
        load_times: of adapters, from when they had a slot until they were ready.
    """

    waiting: int = 0
    running: int = 0
    pending_tokens: int = 0
    blocks: int = 0
    free_blocks: int = 0
    slots: int = 0
    resident: tuple[str, ...] = ()
    loading: tuple[str, ...] = ()
    adapter_bytes: int = 0
    host_bytes: int = 0
    steps: int = 0
    computed_tokens: int = 0
    reused_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    loads: int = 0
    load_failures: int = 0
    evictions: int = 0
    queue_times: Durations = field(default_factory=Durations)
    step_times: Durations = field(default_factory=Durations)
    load_times: Durations = field(default_factory=Durations)
