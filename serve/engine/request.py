"""One answer to a request, from its submission to its last output."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch

from loramill.errors import AdapterInvalid, EngineFault, LoramillError
from loramill.serve.engine.sampling.logprobs import token_logprobs
from loramill.serve.engine.sampling.sampler import Sampler
from loramill.serve.engine.scheduling.scheduler import ScheduledChunk
from loramill.serve.engine.scheduling.sequence import RunningSequence
from loramill.serve.engine.types import FinishReason, Output, Request, TokenLogprobs

#: Tokens that an answer is expected to get at most; few answers use all of their `max_tokens`.
_EXPECTED_TOKENS = 128


@dataclass(slots=True, eq=False)
class RequestState:
    """The state of one of a request's answers.

    Attributes:
        index: Which of the request's answers this is.
        sequence: Its state in the scheduler; the tokens are those of the prompt and the answer.
        sampler: Samples its tokens.
        max_tokens: The most tokens that it may get.
        echo_pending: Whether the prompt is still to be put out.
        prompt_logprobs: Of the prompt's tokens, as far as they have been computed.
        waiting_since: Time of submission by the monotonic clock; None once it has run.
        overload_victim: Whether another tenant's request takes its place among the waiting ones.
        id: The sequence's id.
        version: The version that it runs with; None: the base alone.
        token_limit: The most tokens of its prompt and itself.
    """

    request: Request
    index: int
    sequence: RunningSequence
    sampler: Sampler
    max_tokens: int
    echo_pending: bool
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    waiting_since: float | None = field(default_factory=time.monotonic)
    overload_victim: bool = False
    id: int = field(init=False)
    version: str | None = field(init=False)
    token_limit: int = field(init=False)

    def __post_init__(self) -> None:
        self.id = self.sequence.id
        self.version = self.request.version
        self.token_limit = len(self.request.tokens) + self.max_tokens

    @property
    def is_full(self) -> bool:
        """Whether it has as many tokens as it may get."""
        return len(self.sequence.tokens) == self.token_limit

    @property
    def is_full_with_next(self) -> bool:
        """Whether its next token is the last one that it may get."""
        return len(self.sequence.tokens) + 1 >= self.token_limit

    @property
    def pending_tokens(self) -> int:
        """Number of tokens still to compute, of the prompt and, estimated, of the answer."""
        known = len(self.sequence.tokens)
        left = self.token_limit - known
        return known - self.sequence.computed_tokens + (left if left < _EXPECTED_TOKENS else _EXPECTED_TOKENS)

    def logits_to_keep(self, chunk: ScheduledChunk) -> int:
        """How many of a chunk's last tokens need logits."""
        prompt = self.echo_pending and self.request.sampling_params.logprobs is not None
        if prompt and chunk.start < len(self.request.tokens):
            return chunk.count
        return 1 if chunk.sampled else 0

    def add_prompt_logprobs(self, chunk: ScheduledChunk, logits: torch.Tensor, end: int) -> None:
        """Keeps the log probabilities of an echoed prompt's tokens.

        Args:
            chunk: What was computed.
            logits: float32 [rows, vocabulary].
            end: The row after the last of those of `logits_to_keep`.
        """
        top = self.request.sampling_params.logprobs
        if self.echo_pending and top is not None and self.logits_to_keep(chunk) == chunk.count:
            targets = self.request.tokens[chunk.start + 1 : chunk.start + chunk.count + 1]
            first = end - chunk.count
            rows = logits[first : first + len(targets)]
            # An answer that was preempted starts again.
            self.prompt_logprobs[chunk.start :] = token_logprobs(rows, targets, [top] * len(targets))

    def add(self, token: int | None, logprobs: tuple[TokenLogprobs, ...]) -> Output:
        """Adds a sampled token; returns its output, which is the last one if it has a finish reason.

        Args:
            token: The token; None if no token is valid.
            logprobs: Its log probabilities, if they were requested.
        """
        if self.max_tokens == 0:
            return self.output((), FinishReason.LENGTH)
        if token is None or self.sampler.error is not None:
            return self.end(FinishReason.ERROR, self.sampler.error or self._not_finite())
        if token in self.request.sampling_params.stop_ids:
            return self.output((), FinishReason.STOP)
        self.sequence.tokens.append(token)
        self.sampler.accept(token)
        if self.sampler.finished:
            return self.output((token,), FinishReason.STOP, logprobs)
        if self.is_full:
            return self.output((token,), FinishReason.LENGTH, logprobs)
        return self.output((token,), None, logprobs)

    def end(self, reason: FinishReason, error: LoramillError | None = None) -> Output:
        """Makes the last output of an answer that ends without a further token."""
        return Output(self.request.id, (), reason, error, index=self.index)

    def output(
        self,
        tokens: tuple[int, ...],
        finish_reason: FinishReason | None = None,
        logprobs: tuple[TokenLogprobs, ...] = (),
    ) -> Output:
        """Makes an output of new tokens; the first output starts with the prompt if that is echoed."""
        if self.echo_pending:
            self.echo_pending = False
            tokens = (*self.request.tokens, *tokens)
            if self.request.sampling_params.logprobs is not None:
                first = TokenLogprobs(self.request.tokens[0], None, ())
                logprobs = (first, *self.prompt_logprobs, *logprobs)
        return Output(self.request.id, tokens, finish_reason, None, logprobs, self.index)

    def _not_finite(self) -> LoramillError:
        if self.version is None:
            return EngineFault("The base's logits are not finite.")
        return AdapterInvalid(f"Version {self.version} produces logits that are not finite: its weights are broken.")
