"""Training examples as tokens: each answer follows exactly the prompt that will be served."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from loramill.data.examples import Example, Examples
from loramill.data.messages import Message, first_tool_param
from loramill.data.problems import ProblemList, unit_of
from loramill.data.tokenizer import ChatTokenizer
from loramill.errors import DatasetInvalid, InvalidRequest
from loramill.types import TrainOn

#: Stands for an answer's content, to find its position in a rendered conversation.
_PLACEHOLDER = "loramill-places-the-answer-here"


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
    if example.prompt is not None:
        return _encode_completion(tokenizer, example, example.prompt)
    if (param := first_tool_param(example.messages, example.tools)) and not tokenizer.renders_tool_calls:
        raise DatasetInvalid(
            f"This base's chat template does not render tools or tool calls, so that '{param}' would be "
            "lost: leave them out, or use a base whose template supports tools."
        )
    found: list[EncodedExample] = []
    for index, weight in example.supervised_answers(train_on):
        prompt, completion = _encode_answer(tokenizer, example.messages[: index + 1], example.tools)
        tokens = (*prompt, *completion)
        earlier: tuple[TokenSpan, ...] = ()
        if found and tuple(prompt[: len(found[-1].tokens)]) == found[-1].tokens:
            earlier = found.pop().spans
        found.append(EncodedExample(tokens, len(prompt), weight, earlier, example.line))
    if not found:
        raise DatasetInvalid(
            f"messages[{len(example.messages) - 1}].weight is 0, and only the last answer is to be trained: "
            "give it another weight, or train all answers."
        )
    return replace(found[0], rest=tuple(found[1:]))


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


def encode_for_training(tokenizer: ChatTokenizer, example: Example, train_on: TrainOn) -> TrainingExample:
    """Tokens of an example of any kind.

    Args:
        tokenizer: the base's.
        example: the example.
        train_on: the answers of a conversation to train on; of preference data, only the answers that are judged are.

    Raises:
        DatasetInvalid: as `encode_pair`.
    """
    if example.kind == "preference":
        return encode_pair(tokenizer, example)
    if example.label is not None:
        return LabeledAnswer(encode_example(tokenizer, example, "only_last"), example.label)
    return encode_example(tokenizer, example, train_on)


def encode_pair(tokenizer: ChatTokenizer, example: Example) -> EncodedPair:
    """Tokens of a preference.

    Args:
        tokenizer: the base's.
        example: of the kind "preference".

    Raises:
        DatasetInvalid: as `encode_example`, or no difference between the answers is left.
    """
    chosen, rejected = (encode_example(tokenizer, side, "only_last") for side in example.sides)
    if chosen.tokens == rejected.tokens:
        raise DatasetInvalid(
            "Both answers have the same tokens: this base's vocabulary or chat template leaves no difference between "
            "them; write another answer, or remove the example."
        )
    return EncodedPair(chosen, rejected)


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
    for example in examples.examples:
        where = f"{unit} {example.line}"
        try:
            sides = _encode_sides(tokenizer, example, train_on)
        except InvalidRequest as error:
            problems.add(error.message, where)
            continue
        if example.kind == "preference":  # one pass has both answers
            lengths.append(sum(len(encoded.tokens) for encoded in sides.values()))
        else:
            lengths.extend(len(sequence.tokens) for encoded in sides.values() for sequence in encoded.sequences)
        for side, encoded in sides.items():
            for problem in _length_problems(encoded.sequences, side, max_length):
                problems.add(problem, where)
    problems.raise_if_any()
    return lengths


def _encode_sides(tokenizer: ChatTokenizer, example: Example, train_on: TrainOn) -> Mapping[str, EncodedExample]:
    """The encoded answers of an example by what they are called in messages."""
    encoded = encode_for_training(tokenizer, example, train_on)
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
    try:
        _encode_answer(tokenizer, [Message(role="user", content="Hi"), Message(role="assistant", content="Hello.")])
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


def _encode_answer(
    tokenizer: ChatTokenizer, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()
) -> tuple[list[int], list[int]]:
    """Tokens of the prompt of the last message, which is an answer, and of the answer with its end."""
    answered = tokenizer.render(messages, add_generation_prompt=False, tools=tools)
    before = messages[:-1]
    if before:
        prompt_text = tokenizer.render(before, add_generation_prompt=True, tools=tools)
    else:
        prompt_text = _opening(tokenizer, answered)
    if not answered.startswith(prompt_text):
        answered = prompt_text + _answer_after_opening(tokenizer, messages, tools, prompt_text, answered)
    prompt = tokenizer.codec.encode(prompt_text)
    completion = tokenizer.codec.encode_rest(prompt, tokenizer.codec.encode(answered), answered[len(prompt_text) :])
    end = next((index for index, token in enumerate(completion) if token in tokenizer.stop_ids), None)
    if end is None:
        raise DatasetInvalid(
            "This base's chat template ends an answer with none of its stop tokens, so a "
            "model would never learn to stop; correct eos_token_id in the base's generation_config.json."
        )
    return prompt, completion[: end + 1]


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
