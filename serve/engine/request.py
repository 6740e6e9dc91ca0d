"""One answer between its request's submit and its last output."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from loramill.serve.engine.sampler import Sampler
from loramill.serve.engine.scheduler import RunningSequence, ScheduledChunk
from loramill.serve.engine.types import FinishReason, Output, Request, TokenLogprobs

#: Tokens that an answer is expected to get at most; few get all that they may have.
_EXPECTED_TOKENS = 128


@dataclass(slots=True, eq=False)
class RequestState:
    """The `index`-th of a request's answers.

    Attributes:
        sequence: what the scheduler knows of it; its tokens are the prompt's and the answer's.
        chooser: how its tokens are chosen.
        limit: tokens that it may have.
        echo: whether the prompt is still to be told.
        prompt_logprobs: of the prompt's tokens, as far as they were computed.
        waiting_since: by the monotonic clock; None once it has run.
        displaced: whether it has to give up its place to wait.
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

    @property
    def is_full(self) -> bool:
        """Whether it has all the tokens that it may have."""
        return len(self.sequence.tokens) == len(self.request.tokens) + self.max_tokens

    @property
    def pending_tokens(self) -> int:
        """Tokens still to be computed, of the prompt and, as far as can be guessed, of the answer."""
        known = len(self.sequence.tokens)
        left = len(self.request.tokens) + self.max_tokens - known
        return known - self.sequence.computed_tokens + min(left, _EXPECTED_TOKENS)

    def logits_to_keep(self, chunk: ScheduledChunk) -> int:
        """Of how many of a share's last tokens the logits are wanted."""
        tells = self.echo_pending and self.request.sampling_params.logprobs is not None
        if tells and chunk.start < len(self.request.tokens):
            return chunk.count
        return int(chunk.sampled)

    def append(self, token: int) -> None:
        """Takes the token that was chosen."""
        self.sequence.tokens.append(token)
        self.sampler.accept(token)

    def output(
        self, tokens: tuple[int, ...], finish: FinishReason | None = None, logprobs: tuple[TokenLogprobs, ...] = ()
    ) -> Output:
        """New tokens of it; the first ones come behind the prompt if that is to be echoed."""
        if self.echo_pending:
            self.echo_pending = False
            tokens = (*self.request.tokens, *tokens)
            if self.request.sampling_params.logprobs is not None:
                first = TokenLogprobs(self.request.tokens[0], None, ())
                logprobs = (first, *self.prompt_logprobs, *logprobs)
        return Output(self.request.id, tokens, finish, logprobs=logprobs, index=self.index)
