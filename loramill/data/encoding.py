"""Training examples as tokens: each answer follows exactly the prompt that will be served."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import islice
from typing import Any

from loramill.data.examples import Example, Examples
from loramill.data.messages import Message, first_tool_param
from loramill.data.problems import ProblemList, unit_of
from loramill.data.tokenizer import ChatTokenizer
from loramill.errors import DatasetInvalid, InvalidRequest
from loramill.types import TrainOn

#: Stands for an answer's content, to find its position in a rendered conversation.
_PLACEHOLDER = "loramill-places-the-answer-here"
#: Examples whose texts are tokenized at once, which takes three quarters of the time of one by one.
_BATCH = 512


@dataclass(frozen=True, slots=True)
class TokenSpan:
    """An answer within an example: the loss is computed on its tokens from `start` to before `stop`, times `weight`."""

    start: int
    stop: int
    weight: float


@dataclass(frozen=True, slots=True)
class EncodedExample:
    """A training example, up to the end of the last answer that is trained.

    Attributes:
        tokens: all tokens; those before an answer are exactly the prompt that will be served, and each answer that is
            trained ends with the stop token.
        prompt_length: tokens before the last answer.
        weight: of the last answer's loss, above 0.
        earlier: answers before the last one that are trained too.
        line: its line in the file, from 1; 0: none.
        rest: further sequences, for answers whose prompt in serving does not begin with these tokens: some templates
            remove the reasoning from past answers.
    """

    tokens: tuple[int, ...]
    prompt_length: int
    weight: float = 1.0
    earlier: tuple[TokenSpan, ...] = ()
    line: int = 0
    rest: tuple[EncodedExample, ...] = ()

    @property
    def sequences(self) -> tuple[EncodedExample, ...]:
        """This sequence and the rest."""
        return (self, *self.rest)

    @property
    def spans(self) -> tuple[TokenSpan, ...]:
        """All answers that are trained in these tokens, in order."""
        return (*self.earlier, TokenSpan(self.prompt_length, len(self.tokens), self.weight))


def encode_example(tokenizer: ChatTokenizer, example: Example, train_on: TrainOn = "all") -> EncodedExample:
    """Tokens of a training example.

    Args:
        tokenizer: the base's.
        example: the example.
        train_on: the answers of a conversation to train on.

    Raises:
        DatasetInvalid: no answer is left to train on; there are tools, which the chat template does not render; or the
            template renders earlier messages differently once the answer is there, or does not end an answer with a
            stop token, so that no prefix is the prompt that will be served.
    """
    answers = _render_answers(tokenizer, example, train_on)
    return _join(tokenizer, example, answers, tokenizer.codec.encode_batch(_texts(answers)))


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """Two answers to one prompt; in each, only the answer and its end are trained."""

    chosen: EncodedExample
    rejected: EncodedExample

    @property
    def sequences(self) -> tuple[EncodedExample, ...]:
        """Both."""
        return self.chosen, self.rejected

    @property
    def line(self) -> int:
        """Its line in the file."""
        return self.chosen.line


@dataclass(frozen=True, slots=True)
class LabeledAnswer:
    """An answer that is good (`desirable`) or bad; only the answer and its end are trained."""

    answer: EncodedExample
    desirable: bool

    @property
    def sequences(self) -> tuple[EncodedExample, ...]:
        """The answer with its prompt."""
        return (self.answer,)

    @property
    def line(self) -> int:
        """Its line in the file."""
        return self.answer.line


TrainingExample = EncodedExample | EncodedPair | LabeledAnswer


def encode_for_training(
    tokenizer: ChatTokenizer, examples: Sequence[Example], train_on: TrainOn
) -> Iterator[TrainingExample | InvalidRequest]:
    """Tokens of examples of any kind, each by itself, or in its place the error that `encode_example` raises.

    Args:
        tokenizer: the base's.
        examples: the examples.
        train_on: the answers of a conversation to train on; of preference data, only the answers that are judged are.
    """
    for start in range(0, len(examples), _BATCH):
        batch = examples[start : start + _BATCH]
        rendered = [_rendered_sides(tokenizer, each, train_on) for each in batch]
        texts = [_texts(side) for sides in rendered if not isinstance(sides, InvalidRequest) for side in sides]
        tokens = iter(tokenizer.codec.encode_batch([text for each in texts for text in each]))
        for example, sides in zip(batch, rendered, strict=True):
            if isinstance(sides, InvalidRequest):
                yield sides
                continue
            own = [list(islice(tokens, len(_texts(side)))) for side in sides]
            try:
                encoded = [_join(tokenizer, *each) for each in zip(example.sides, sides, own, strict=True)]
                yield _training_example(example, encoded)
            except InvalidRequest as error:
                yield error


def encode_all(tokenizer: ChatTokenizer, examples: Sequence[Example], train_on: TrainOn) -> list[TrainingExample]:
    """Tokens of examples of any kind.

    Raises:
        DatasetInvalid: as `encode_pair`, of the first example that has no tokens.
    """
    found: list[TrainingExample] = []
    for encoded in encode_for_training(tokenizer, examples, train_on):
        if isinstance(encoded, InvalidRequest):
            raise encoded
        found.append(encoded)
    return found


def encode_pair(tokenizer: ChatTokenizer, example: Example) -> EncodedPair:
    """Tokens of a preference.

    Args:
        tokenizer: the base's.
        example: of the kind "preference".

    Raises:
        DatasetInvalid: as `encode_example`, or no difference between the answers is left.
    """
    return _pair(*(encode_example(tokenizer, side, "only_last") for side in example.sides))


def _pair(chosen: EncodedExample, rejected: EncodedExample) -> EncodedPair:
    if chosen.tokens == rejected.tokens:
        raise DatasetInvalid(
            "Both answers have the same tokens: this base's vocabulary or chat template leaves no difference between "
            "them; write another answer, or remove the example."
        )
    return EncodedPair(chosen, rejected)


def _training_example(example: Example, encoded: Sequence[EncodedExample]) -> TrainingExample:
    if example.kind == "preference":
        return _pair(*encoded)
    return encoded[0] if example.label is None else LabeledAnswer(encoded[0], example.label)


def check_tokens(
    examples: Examples, tokenizer: ChatTokenizer, max_length: int, train_on: TrainOn = "all"
) -> Sequence[int]:
    """Checks examples by the base's tokenizer and chat template: lengths, tools, and what the template refuses.

    Examples are never truncated, since that would cut off the answer that is to be trained.

    Args:
        examples: the file's.
        tokenizer: the base's.
        max_length: maximum tokens of an example: prompt, completion and end together.
        train_on: the answers of a conversation to train on.

    Returns:
        Tokens of each sequence. An example may have several; a preference has one length, of both answers with their
        prompts.

    Raises:
        DatasetInvalid: as `read_examples`.
    """
    problems, unit = ProblemList(examples.filename), unit_of(examples.filename)
    tokenizer = tokenizer.at_time(datetime.now(UTC))
    lengths = array("L")
    found = encode_for_training(tokenizer, examples.examples, train_on)
    for example, encoded_example in zip(examples.examples, found, strict=True):
        where = f"{unit} {example.line}"
        if isinstance(encoded_example, InvalidRequest):
            problems.add(encoded_example.message, where)
            continue
        sides = _sides(encoded_example)
        if example.kind == "preference":  # one pass has both answers
            lengths.append(sum(len(encoded.tokens) for encoded in sides.values()))
        else:
            lengths.extend(len(sequence.tokens) for encoded in sides.values() for sequence in encoded.sequences)
        for side, encoded in sides.items():
            for problem in _length_problems(encoded.sequences, side, max_length):
                problems.add(problem, where)
    problems.raise_if_any()
    return lengths


def _sides(encoded: TrainingExample) -> Mapping[str, EncodedExample]:
    """The encoded answers of an example by what they are called in messages."""
    if isinstance(encoded, EncodedPair):
        return {"chosen ": encoded.chosen, "rejected ": encoded.rejected}
    return {"": encoded.answer if isinstance(encoded, LabeledAnswer) else encoded}


def _length_problems(sequences: Sequence[EncodedExample], side: str, max_length: int) -> Iterator[str]:
    longest = max(sequences, key=lambda sequence: len(sequence.tokens))
    count, prompt = len(longest.tokens), longest.prompt_length
    if any(span.stop == span.start + 1 for sequence in sequences for span in sequence.spans):
        yield (
            f"the {side}completion has no tokens: this base's vocabulary or chat template leaves nothing of it; "
            "write it in other characters, or remove the example."
        )
    if count > max_length:
        filled = "the prompt alone fills it, " if prompt >= max_length else ""
        yield (
            f"{f'with its {side}answer ' if side else ''}it has {count} tokens (prompt {prompt}, completion "
            f"{count - prompt}), {filled}the limit is {max_length}; shorten it or raise max_length (nothing is "
            "truncated: that would cut the completion)."
        )


def training_problem(tokenizer: ChatTokenizer) -> str | None:
    """Why a base can't train on conversations, as the end of a sentence; None if it can."""
    if tokenizer.chat_problem:
        return tokenizer.chat_problem
    answer = Message(role="assistant", content="Hello.")
    try:
        encode_example(tokenizer, Example((Message(role="user", content="Hi"), answer), None, "Hello.", 0))
    except InvalidRequest as error:
        return error.message
    return None


def limitations(tokenizer: ChatTokenizer) -> tuple[str, ...]:
    """What a base can't do because of its chat template, one sentence each; empty for most bases."""
    if tokenizer.chat_problem:
        return (f"This base serves completions only, not chat: {tokenizer.chat_problem}.",)
    if problem := training_problem(tokenizer):
        return (f"This base trains on prompts and completions only, not on conversations: {problem}",)
    return ()


def _encode_completion(tokenizer: ChatTokenizer, example: Example, prompt_text: str) -> EncodedExample:
    """Tokens of completion data."""
    prompt = tokenizer.encode_text(prompt_text)
    whole = tokenizer.encode_text(prompt_text + example.completion)
    completion = tokenizer.codec.encode_rest(prompt, whole, tokenizer.codec.escape(example.completion))
    weight = 1.0 if example.weights is None else example.weights[0]
    return EncodedExample((*prompt, *completion, tokenizer.stop_ids[0]), len(prompt), weight, line=example.line)


@dataclass(frozen=True, slots=True)
class _Answer:
    """An answer to train as text: its prompt, and the whole with the answer and its end, special tokens escaped."""

    prompt: str
    whole: str
    weight: float


def _texts(answers: Sequence[_Answer]) -> list[str]:
    return [text for answer in answers for text in (answer.prompt, answer.whole)]


def _rendered_sides(
    tokenizer: ChatTokenizer, example: Example, train_on: TrainOn
) -> list[Sequence[_Answer]] | InvalidRequest:
    judged: TrainOn = train_on if example.kind == "supervised" else "only_last"
    try:
        return [_render_answers(tokenizer, side, judged) for side in example.sides]
    except InvalidRequest as error:
        return error


def _render_answers(tokenizer: ChatTokenizer, example: Example, train_on: TrainOn) -> Sequence[_Answer]:
    """The answers of a conversation that are trained; of completion data, which no template renders, none."""
    if example.prompt is not None:
        return ()
    if (param := first_tool_param(example.messages, example.tools)) and not tokenizer.renders_tool_calls:
        raise DatasetInvalid(
            f"This base's chat template does not render tools or tool calls, so that '{param}' would be "
            "lost: leave them out, or use a base whose template supports tools."
        )
    found = [
        _Answer(*_render_answer(tokenizer, example.messages[: index + 1], example.tools), weight)
        for index, weight in example.supervised_answers(train_on)
    ]
    if not found:
        raise DatasetInvalid(
            f"messages[{len(example.messages) - 1}].weight is 0, and only the last answer is to be trained: "
            "give it another weight, or train all answers."
        )
    return found


def _join(
    tokenizer: ChatTokenizer, example: Example, answers: Sequence[_Answer], tokens: Sequence[list[int]]
) -> EncodedExample:
    """The tokens of an example, from those of the `_texts` of its answers."""
    if example.prompt is not None:
        return _encode_completion(tokenizer, example, example.prompt)
    found: list[EncodedExample] = []
    for answer, prompt, whole in zip(answers, tokens[::2], tokens[1::2], strict=True):
        completion = tokenizer.codec.encode_rest(prompt, whole, answer.whole[len(answer.prompt) :])
        end = next((index for index, token in enumerate(completion) if token in tokenizer.stop_ids), None)
        if end is None:
            raise DatasetInvalid(
                "This base's chat template ends an answer with none of its stop tokens, so a "
                "model would never learn to stop; correct eos_token_id in the base's generation_config.json."
            )
        trained = (*prompt, *completion[: end + 1])
        earlier: tuple[TokenSpan, ...] = ()
        if found and tuple(prompt[: len(found[-1].tokens)]) == found[-1].tokens:
            earlier = found.pop().spans
        found.append(EncodedExample(trained, len(prompt), answer.weight, earlier, example.line))
    return replace(found[0], rest=tuple(found[1:])) if len(found) > 1 else found[0]


def _render_answer(
    tokenizer: ChatTokenizer, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]
) -> tuple[str, str]:
    """The text of the prompt of the last message, which is an answer, and of both together."""
    answered = tokenizer.render(messages, add_generation_prompt=False, tools=tools)
    before = messages[:-1]
    if before:
        prompt_text = tokenizer.render(before, add_generation_prompt=True, tools=tools)
    else:
        prompt_text = _opening(tokenizer, answered)
    if not answered.startswith(prompt_text):
        answered = prompt_text + _answer_after_opening(tokenizer, messages, tools, prompt_text, answered)
    return prompt_text, answered


def _opening(tokenizer: ChatTokenizer, answered: str) -> str:
    """The text before an answer that begins the conversation, for which no prompt can be rendered."""
    one = [Message(role="user", content="Hi")]
    question = tokenizer.render(one, add_generation_prompt=False)
    opening = tokenizer.render(one, add_generation_prompt=True).removeprefix(question)
    before, found, _ = answered.partition(opening) if opening else ("", "", "")
    if not found:
        raise DatasetInvalid(
            "messages[0] is the assistant's, and this base's chat template does not show where such an "
            "answer begins: give it the weight 0, or put a message before it."
        )
    return before + found


def _answer_after_opening(
    tokenizer: ChatTokenizer,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]],
    prompt_text: str,
    answered: str,
) -> str:
    """The text after a generation prompt that already begins the answer, such as one that ends in `<think>`.

    Such templates render past answers without that opening, and often without their reasoning. In serving, the prompt
    is followed by the answer's content as the example has it, without the opening if the content repeats it; so that is
    what training uses.
    """
    answer = messages[-1]
    placed: list[Message] = [*messages[:-1], {**answer, "content": _PLACEHOLDER}]
    lead, found, tail = tokenizer.render(placed, add_generation_prompt=False, tools=tools).partition(_PLACEHOLDER)
    if not found or not prompt_text.startswith(lead):
        raise DatasetInvalid(
            "This base's chat template writes the messages before an answer differently once "
            "the answer is there; use prompt/completion examples, or a base with another template."
        )
    if not answer["content"] and answered.startswith(lead):
        return answered[len(lead) :]
    content = _without_opening(answer["content"], prompt_text[len(lead) :])
    return f"{tokenizer.codec.escape(content)}{tail}"


def _without_opening(content: str, opening: str) -> str:
    """The content without the opening of the generation prompt, if it begins with that; white space is ignored."""
    begins, space = opening.strip(), opening[len(opening.rstrip()) :]
    if not begins or not content.lstrip().startswith(begins):
        return content
    return content.lstrip()[len(begins) :].removeprefix(space)
