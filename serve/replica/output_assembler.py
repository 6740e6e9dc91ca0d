"""From a request's tokens to the chunks of its answer: text up to a stop string, token counts, log probabilities."""

from __future__ import annotations

from collections.abc import Sequence

from loramill.data.token_bytes import TokenBytes
from loramill.data.tokenizer import ChatTokenizer, IncrementalDecoder
from loramill.serve.engine import FinishReason, Output
from loramill.serve.engine import TokenLogprobs as EngineLogprobs
from loramill.serve.protocol import SampledToken, TextChunk, TextRequest, TokenText
from loramill.serve.replica.stop_strings import StopScanner


class OutputAssembler:
    """Assembles the answer to one request.

    Args:
        prompt_tokens: the prompt's number of tokens.
    """

    def __init__(self, tokenizer: ChatTokenizer, request: TextRequest, prompt_tokens: int) -> None:
        self._decoder = IncrementalDecoder(tokenizer)
        self._stop_scanner = StopScanner(request.stop)
        self._token_texts = TokenTexts(tokenizer.token_bytes)
        self._prompt_tokens = prompt_tokens
        self._completion_tokens = 0
        self._echo_tokens = prompt_tokens if request.sampling_params.echo else 0

    def push(self, outputs: Sequence[Output]) -> TextChunk | None:
        """Returns what the outputs add to the answer; None if there is nothing to send yet.

        Raises:
            LoramillError: the engine's, if the request failed.
        """
        last = outputs[-1]
        if last.error is not None:
            raise last.error
        text, stopped = self._text([token for output in outputs for token in output.tokens], last.finish_reason)
        finish = FinishReason.STOP if stopped else last.finish_reason
        logprobs = tuple(self._token_texts.translate(entry) for output in outputs for entry in output.logprobs)
        if not (text or finish or logprobs):
            return None
        return TextChunk(text, self._prompt_tokens, self._completion_tokens, finish.value if finish else None, logprobs)

    def _text(self, tokens: Sequence[int], finish: FinishReason | None) -> tuple[str, bool]:
        """Decodes tokens up to a stop string; returns the text, and whether a stop string was reached."""
        # An echoed prompt comes first, in one output, and no stop string ends it.
        prompt, tokens, self._echo_tokens = tokens[: self._echo_tokens], tokens[self._echo_tokens :], 0
        echoed = self._decoder.push(prompt) if prompt else ""
        self._completion_tokens += len(tokens)
        decoded = self._decoder.push(tokens) + (self._decoder.finish() if finish else "")
        text, stopped = self._stop_scanner.push(decoded)
        if finish and not stopped:
            text += self._stop_scanner.finish()
        return echoed + text, stopped


class TokenTexts:
    """Adds texts and bytes to an answer's tokens, in order; the first token may lose its leading space."""

    def __init__(self, tokens: TokenBytes) -> None:
        self._tokens = tokens
        self._first = True

    def translate(self, entry: EngineLogprobs) -> SampledToken:
        """The next token and its alternatives, each with a text of its own."""
        names: dict[str, int] = {}
        for token in (entry.token, *(token for token, _ in entry.top)):
            text = self._tokens.text(token, first=self._first)
            names.setdefault(text if names.get(text, token) == token else self._tokens.piece(token), token)
        texts = {token: text for text, token in names.items()}

        def token_text(token: int, logprob: float | None) -> TokenText:
            return TokenText(texts[token], logprob, self._tokens.bytes_of(token, first=self._first))

        sampled = SampledToken(token_text(entry.token, entry.logprob), tuple(token_text(*each) for each in entry.top))
        self._first = self._first and sampled.token.raw is None
        return sampled
