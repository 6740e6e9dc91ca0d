"""The engine's inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from loramill.errors import LoramillError, SettingsInvalid
from loramill.serve.engine.durations import Durations
from loramill.serve.sampling_params import SamplingParams

#: From a version's hash to a local PEFT folder. Called in the loader's threads, so it may block and must be
#: thread-safe; the requests that wait for the version get the error that it raises.
AdapterSource = Callable[[str], Path]


class TokenMask(Protocol):
    """The tokens that may continue one answer, such as those that a grammar allows. No method raises."""

    @property
    def finished(self) -> bool:
        """Whether no token may follow, so that the answer ends here."""
        ...

    @property
    def error(self) -> LoramillError | None:
        """The error that ends the answer, if there is one."""
        ...

    def allowed_bits(self) -> npt.NDArray[np.uint8]:
        """Whether each token may come next, one bit per token; at least one may. Stop tokens may if the answer may end.

        Returns:
            uint8 [vocabulary / 8, rounded up]; the first token's bit is the lowest of the first byte.
        """
        ...

    def accept(self, token: int) -> None:
        """Appends a token, which is not a stop token, to the answer."""
        ...


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt to continue.

    Attributes:
        id: Unique among live requests.
        tenant: Owner of the request, for fairness.
        tokens: The prompt.
        version: Version of an adapter to run with; None: the base alone.
        priority: A higher priority runs first, and preempts lower ones if there is no room.
        timeout_seconds: Time from submission after which the request ends with DeadlineExceeded; None: no limit.
        mask: Makes the mask of each answer; None: all tokens are allowed.
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
    """Why an answer ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural log probabilities at one position, before penalties and temperature.

    Attributes:
        token: The token at the position.
        logprob: Its log probability; None for the first token of an echoed prompt.
        top: The most probable tokens and their log probabilities, best first.
    """

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


class Output(NamedTuple):
    """New tokens of one answer. A tuple, since a step makes one per answer.

    Attributes:
        request_id: Id of the request.
        tokens: The new tokens.
        finish_reason: Set in an answer's last output.
        error: Set if the finish reason is ERROR.
        logprobs: One per token, if they were requested.
        index: Which of the request's answers.
    """

    request_id: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason | None = None
    error: LoramillError | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    index: int = 0  # type: ignore[assignment]  # a tuple's method


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Limits of one engine.

    Attributes:
        max_batch_tokens: Tokens per step; on a CPU, more make answers less smooth and not faster.
        max_sequences: Number of answers that run at once.
        kv_tokens: Tokens that the KV cache holds, rounded down to whole blocks.
        prefix_cache: Whether prompts with a common start, under one version, share computed blocks.
        block_size: Tokens per block.
        adapter_slots: Number of adapters resident at once.
        adapter_bytes: Bytes of all resident adapters together.
        host_bytes: Bytes of the host-memory cache of adapters; with 0, an adapter that lost its slot is read again.
        rank_budget: Largest sum of the ranks of a step's different adapters; one adapter always runs.
        adapter_bits: 16 keeps adapters in the base's own dtype. 8 halves their memory and the time that many different
            ones take in a step, with an error of about 1% of what an adapter adds.
        max_waiting: Number of answers that may wait in addition to those that may run. Beyond it, a new request is
            refused, or replaces the newest one of a tenant that has more of them waiting.
        load_threads: Number of adapters that are fetched and read at once.
        slot_patience_steps: Steps that a version waits for a slot before one is taken from a version in use.
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
            minimum = 0 if name in ("prefix_cache", "host_bytes") else 1
            if getattr(self, name) < minimum:
                raise SettingsInvalid(f"The engine's {name} is {getattr(self, name)}; it must be at least {minimum}.")
        if self.block_size % 16:
            raise SettingsInvalid(f"The engine's block_size is {self.block_size}; it must be a multiple of 16.")
        if self.kv_tokens < self.block_size:
            raise SettingsInvalid(f"The engine's kv_tokens ({self.kv_tokens}) don't hold a block of {self.block_size}.")


@dataclass(frozen=True, slots=True)
class EngineStats:
    """The state of the engine after its last step; counters and durations are totals since its start.

    Attributes:
        waiting: Number of answers that do not run, those that wait for their adapter included.
        running: Number of answers that run.
        pending_tokens: Number of tokens still to compute for both, of prompts and, estimated, of answers.
        blocks: Number of blocks of the KV cache.
        free_blocks: Number of blocks that no sequence holds.
        slots: Number of adapter slots.
        resident: Versions that are loaded into slots.
        loading: Versions being fetched.
        adapter_bytes: Bytes of the resident adapters.
        host_bytes: Bytes of the adapters in the host cache.
        steps: Number of steps that ran the model.
        computed_tokens: Number of tokens that the model has computed, of prompts and answers.
        reused_tokens: Number of tokens taken from the prefix cache instead.
        generated_tokens: Number of tokens put out.
        preemptions: Number of times that a running answer had to wait again.
        loads: Number of versions loaded.
        load_failures: Number of versions that could not be loaded.
        evictions: Number of versions that lost their slots.
        failed_captures: Number of CUDA graphs that could not be captured; steps of their sizes run without one.
        queue_times: Of answers, from submission until they first ran.
        step_times: Of steps that ran the model.
        load_times: Of adapters, from getting a slot until they were ready.
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
    failed_captures: int = 0
    queue_times: Durations = field(default_factory=Durations)
    step_times: Durations = field(default_factory=Durations)
    load_times: Durations = field(default_factory=Durations)
