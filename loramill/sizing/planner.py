"""Whether a job fits, what is chosen so that it does, and what would fit if it doesn't."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

from loramill.errors import DoesNotFit
from loramill.settings import JobSettings
from loramill.sizing.anatomy import Anatomy
from loramill.sizing.full_finetune import need_full
from loramill.sizing.memory import Device, Need, Row, need, row_of
from loramill.sizing.targets import Tuning, tuning
from loramill.types import JobSpec, Quantization

#: What sizing may choose, where the submitter left it open.
FREE = ("micro_tokens", "gradient_checkpointing", "offload")

#: Tokens of a forward pass beyond which a GPU gains next to nothing.
GPU_TOKENS = 4096

#: Tokens whose arithmetic takes as long as what each forward pass costs besides: dequantising the base (a measured
#: +37% on 512 tokens, +2% on 8,192), or only the calls.
_OVERHEAD_NF4, _OVERHEAD = 190, 16
_CHECKPOINTING = 4 / 3
_OFFLOAD = {"none": 1.0, "optimizer": 1.3, "all": 2.0}
_MOST_SHARERS = 16
_MOST_NEAREST = 4


@dataclass(frozen=True, slots=True)
class Pool:
    """The device that a job runs on.

    Attributes:
        bytes: of one device.
        sharers: jobs that share it, each with as much.
    """

    device: Device
    bytes: int
    sharers: int = 1

    @classmethod
    def of(cls, settings: JobSettings) -> Pool | None:
        """What the settings say; None if they don't tell the size."""
        if settings.device_bytes is None:
            return None
        return (
            cls("cuda", settings.device_bytes, settings.per_gpu)
            if settings.use_gpu
            else cls("cpu", settings.device_bytes)
        )

    @property
    def budget(self) -> int:
        """Bytes of one job."""
        return self.bytes // self.sharers


@dataclass(frozen=True, slots=True)
class Question:
    """A job, its base, its data and where it is to run.

    Attributes:
        open: names of `FREE` that may be chosen.
        learnt: the largest share of a row's tokens with a loss.
        alike: whether examples may begin with the same tokens.
    """

    spec: JobSpec
    base: Anatomy
    quantization: Quantization
    lengths: tuple[int, ...]
    pool: Pool
    open: frozenset[str]
    learnt: float = 1.0
    alike: bool = True


@dataclass(frozen=True, slots=True)
class Plan:
    """A job that fits: its spec with everything chosen, and what that needs."""

    spec: JobSpec
    row: Row
    need: Need
    pool: Pool

    @property
    def sharers(self) -> int:
        """How many such jobs one device holds, at most 16."""
        return max(1, min(_MOST_SHARERS, self.pool.bytes // self.need.bytes))

    @property
    def passes(self) -> int:
        """Forward passes whose gradients make a step; each is of one example at least."""
        return min(self.spec.batch_size, -(-self.row.step // self.spec.micro_tokens))

    @property
    def told(self) -> str:
        """It in a sentence."""
        spec = self.spec
        how = ["gradient_checkpointing = true"] if spec.gradient_checkpointing else []
        how += [f"offload = {spec.offload}"] if spec.offload != "none" else []
        passes = (
            f"micro_tokens = {spec.micro_tokens} ({self.passes} passes a step, of up to {self.row.tokens:,} tokens)"
        )
        sharing = f"; {self.sharers} such jobs fit one device" if self.sharers > 1 else ""
        return f"Fits: about {gb(self.need.bytes)} of {gb(self.pool.budget)} with {', '.join([passes, *how])}{sharing}."


def plan(question: Question) -> Plan:
    """The fastest choice that fits.

    Raises:
        DoesNotFit: there is none; `nearest` tells the nearest jobs for which there is one.
        InvalidRequest: a target, layer or pattern matches nothing.
    """
    found = fitting(question)
    if found is not None:
        return found
    least = min(sizes(question), key=lambda plan: plan.need.bytes)
    others = nearest(question)
    share = "" if question.pool.sharers == 1 else f" (1/{question.pool.sharers} of a GPU)"
    advice = f" Nearest that fit: {'; '.join(words for words, _ in others)}." if others else " Nothing near it fits."
    raise DoesNotFit(
        f"The job needs {gb(least.need.bytes)}, and has {gb(question.pool.budget)}{share}; most of it is "
        f"{max(least.need.items, key=lambda item: item.bytes).name}.{advice}",
        nearest=[words for words, _ in others],
    )


def fitting(question: Question) -> Plan | None:
    """The fastest choice that fits, or None."""
    fit = [each for each in sizes(question) if each.need.bytes <= question.pool.budget]
    return min(fit, key=partial(_cost, question), default=None)


def sizes(question: Question) -> Iterator[Plan]:
    """What each choice needs."""
    tuned = None if question.spec.method == "full" else tuning(question.spec, question.base)
    for spec in choices(question):
        yield sized(question, spec, tuned)


def sized(question: Question, spec: JobSpec, tuned: Tuning | None = None) -> Plan:
    """What a spec needs, as it is."""
    row = row_of(spec, question.lengths, question.learnt, alike=question.alike)
    if spec.method == "full":
        needed = need_full(spec, question.base, row, question.pool.device)
    else:
        needed = need(spec, question.base, question.quantization, row, question.pool.device, tuned=tuned)
    return Plan(spec, row, needed, question.pool)


def choices(question: Question) -> Iterator[JobSpec]:
    """The specs that differ from the question's only in what is open."""
    spec, free = question.spec, question.open
    tokens = _micro_tokens(question) if "micro_tokens" in free else [spec.micro_tokens]
    checkpointing = [False, True] if "gradient_checkpointing" in free else [spec.gradient_checkpointing]
    offloads = (
        list(_OFFLOAD)
        if "offload" in free and spec.method == "full" and question.pool.device == "cuda"
        else [spec.offload]
    )
    for offload in offloads:
        for recompute in checkpointing:
            for count in tokens:
                yield spec.model_copy(
                    update={"micro_tokens": count, "gradient_checkpointing": recompute, "offload": offload}
                )


def nearest(question: Question) -> list[tuple[str, Question]]:
    """Questions that have an answer, each with its words, at most 4: the nearest first.

    Near is one thing changed, a number by no more than a factor of 4; then two; then a number by any factor; then
    everything at once.
    """
    pairs = [
        (f"{first} and {second}", both)
        for first, once in _switches(question)
        for second, both in [*_switches(once), *_numbers(once)]
    ]
    ways: Iterable[tuple[str, Question]] = chain(
        _switches(question), _numbers(question), pairs, _numbers(question, far=True), _everything(question)
    )
    found: dict[str, Question] = {}
    for words, changed in ways:
        parts = words.split(" and ")
        beyond = any(set(known.split(" and ")) <= set(parts) for known in found)
        if not beyond and fitting(changed):
            found[words] = changed
        if len(found) == _MOST_NEAREST:
            break
    return list(found.items())


def gb(size: float) -> str:
    """Bytes as people say them."""
    return f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def _cost(question: Question, plan: Plan) -> float:
    """Time a token, relative to a pass without end; equal ones keep what the spec says."""
    nf4 = question.quantization == "nf4" and question.pool.device == "cuda"
    calls = 1 + (_OVERHEAD_NF4 if nf4 else _OVERHEAD) / plan.row.tokens
    return calls * (_CHECKPOINTING if plan.spec.gradient_checkpointing else 1.0) * _OFFLOAD[plan.spec.offload]


def _micro_tokens(question: Question) -> list[int]:
    """What the spec says, its halves down to one example a pass, and on a GPU its doubles."""
    asked = question.spec.micro_tokens
    longest = min(question.spec.max_length, max(question.lengths, default=question.spec.max_length))
    halves = [
        asked >> times for times in range(asked.bit_length()) if (asked >> max(0, times - 1)) > longest or not times
    ]
    last = [1] if halves[-1] > 1 else []
    doubles = [asked << times for times in range(1, 16) if asked << times <= GPU_TOKENS]
    return halves + last + (doubles if question.pool.device == "cuda" else [])


def _switches(question: Question) -> Iterator[tuple[str, Question]]:
    """What is one way or another, turned to where it takes less."""
    spec = question.spec
    if not spec.gradient_checkpointing and "gradient_checkpointing" not in question.open:
        yield "gradient_checkpointing = true", _with(question, gradient_checkpointing=True)
    if "micro_tokens" not in question.open:
        yield "micro_tokens left open", replace(question, open=question.open | {"micro_tokens"})
    if spec.method == "full" and "offload" not in question.open:
        yield "offload left open", replace(question, open=question.open | {"offload"})
    if spec.method == "full":
        yield 'method = "lora"', _with(question, method="lora", offload="none")
    if question.quantization != "nf4" and spec.method != "full" and question.pool.device == "cuda":
        yield 'a base in quantization = "nf4" (a setting of the pool)', replace(question, quantization="nf4")
    if question.pool.sharers > 1:
        yield "a whole GPU (per_gpu = 1)", replace(question, pool=replace(question.pool, sharers=1))


def _numbers(question: Question, *, far: bool = False) -> Iterator[tuple[str, Question]]:
    """What is a number, as large as fits; `far` allows less than a quarter of what was asked."""
    spec = question.spec
    lowest = 1 if far else -(-spec.rank // 4)
    if spec.method != "full" and (rank := _largest(spec.rank, lowest, lambda value: _with(question, rank=value))):
        yield f"rank = {rank}", _with(question, rank=rank)
    length = min(spec.max_length, max(question.lengths, default=spec.max_length))
    lowest = 8 if far else max(8, -(-length // 4))
    if shorter := _largest(length, lowest, lambda value: _with(question, max_length=value)):
        yield f"max_length = {shorter}", _with(question, max_length=shorter)


def _everything(question: Question) -> Iterator[tuple[str, Question]]:
    """All switches at once, alone and with one number, whatever it takes."""
    words: list[str] = []
    while switch := next(_switches(question), None):
        words.append(switch[0])
        question = switch[1]
    if words:
        yield " and ".join(words), question
    for number, changed in _numbers(question, far=True):
        yield " and ".join([*words, number]), changed


def _with(question: Question, **fields: Any) -> Question:
    return replace(question, spec=question.spec.model_copy(update=fields))


def _largest(below: int, lowest: int, change: Callable[[int], Question]) -> int | None:
    """The largest value from `lowest` to before `below` that fits; None if that one doesn't."""
    if lowest >= below or not fitting(change(lowest)):
        return None
    low, high = lowest, below - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fitting(change(middle)) else (low, middle - 1)
    return low
