"""Reads and checks the data of a task before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from loramill.data.encoding import EncodedExample, check_tokens, encode_example
from loramill.data.examples import Example, read_examples
from loramill.data.tokenizer import ChatTokenizer
from loramill.errors import DatasetInvalid
from loramill.models.catalog import Base, find_base
from loramill.names import AdapterName
from loramill.pipelines.compare.types import LEARNING_RATES, Task
from loramill.submission.defaults import resolve_spec
from loramill.submission.request import Hyperparameters, JobRequest, LoramillOptions
from loramill.types import JobSpec


@dataclass(frozen=True, slots=True)
class TaskData:
    """The base and the data that a task names.

    Attributes:
        base: with the quantization that the subject trains on.
        spec: the spec for the training loop; its method is "lora" for prefix tuning and bottleneck adapters.
    """

    base: Base
    tokenizer: ChatTokenizer
    spec: JobSpec
    train: tuple[EncodedExample, ...]
    valid: tuple[EncodedExample, ...]
    test: tuple[Example, ...]


def read_task(task: Task) -> TaskData:
    """Finds the base and reads the examples.

    Raises:
        BaseUnusable: the base was not found.
        DatasetInvalid: an example is bad, or too long for the base, or a preference.
        InvalidRequest: a hyperparameter is invalid.
    """
    base = find_base(task.base, task.cache, "nf4" if task.subject == "qlora" else "none")
    tokenizer = ChatTokenizer.load(base.folder).at_time(datetime.now(UTC))
    files = [read_examples(path.read_bytes(), path.name) for path in (task.train, task.valid, task.test)]
    spec = _spec(task, base, len(files[0].examples))
    for file in files:
        if file.kind != "supervised":
            raise DatasetInvalid(
                f"{file.filename} holds preferences, and methods are compared on answers: give messages, or prompt and "
                "completion."
            )
        check_tokens(file, tokenizer, spec.max_length, spec.train_on)
    train, valid = (
        tuple(encode_example(tokenizer, each, spec.train_on) for each in file.examples) for file in files[:2]
    )
    return TaskData(base, tokenizer, spec, train, valid, files[2].examples)


def _spec(task: Task, base: Base, examples: int) -> JobSpec:
    method = "lora" if task.subject in ("base", "prefix", "bottleneck") else task.subject
    options = {
        "method": method,
        "rank": task.rank,
        "steps": task.steps,
        "learning_rate": task.learning_rate or LEARNING_RATES.get(task.subject),
    }
    hyperparameters = {} if task.batch_size is None else {"batch_size": task.batch_size}
    request = JobRequest(
        adapter=AdapterName("compare", task.subject),
        train=task.train.name,
        valid=task.valid.name,
        seed=task.seed,
        hyperparameters=Hyperparameters.model_validate(hyperparameters),
        options=LoramillOptions.model_validate(options),
    )
    return resolve_spec(request, base, examples)
