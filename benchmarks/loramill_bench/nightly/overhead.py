"""The overhead of a nightly run per adapter: all its stages and its report, without training and without answering.

Two runs over the same adapters, with a new SQLite registry: the first trains all of them from nothing, the second
continues from their champions with some new data. A pool of the benchmark publishes versions without training and
answers questions from memory; its time is not counted.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from loramill.errors import JobError, LoramillError
from loramill.names import AdapterName
from loramill.pipelines.nightly.context import STAGES
from loramill.pipelines.nightly.definition import NightlyDefinition
from loramill.pipelines.nightly.questions import EvalAnswer, EvalQuestion
from loramill.pipelines.nightly.report.publish import publish_run
from loramill.pipelines.nightly.run import run_nightly
from loramill.registry import Registry, datasets, jobs, migrate, nightly, tenants
from loramill.settings import Settings
from loramill.types import NightlyStep, StepStatus, VersionRecord
from loramill_bench.results import Result

#: CPU seconds per adapter for the whole run without training and answering.
OVERHEAD_SECONDS = 0.05
ADAPTERS, FIRST, NEW = 300, 500, 50
#: How often the pool's versions and the base answer right: each version is better than the one before it.
_RIGHT = {"base": 0.0, "first": 0.8, "second": 0.95}
_WORDS = [
    f"{a}{b}{c}" for a in ("ka", "lo", "mi", "ru", "te") for b in ("n", "r", "st", "l") for c in ("a", "e", "o", "u")
]


class Clock:
    """The CPU time of this process, by stage, without the time in which it is paused."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._last = time.process_time()

    def lap(self, stage: str) -> None:
        """Counts the time since the last call of any method for `stage`."""
        now = time.process_time()
        self.seconds[stage] += now - self._last  # type: ignore[assignment]  # Counter's values are typed as int
        self._last = now

    def on_step(self, step: NightlyStep) -> None:
        """Counts the time since the last step for the stage of this one."""
        self.lap(step.step)


class InstantPool:
    """Trains and answers in no time of the clock; see `EvalGateway`."""

    def __init__(self, registry: Registry, clock: Clock, answers: dict[str, str]) -> None:
        self._registry, self._clock, self._answers = registry, clock, answers
        self._right: dict[str, float] = {}
        self._random = random.Random(0)

    def check(self) -> None:
        """Publishes a version for every queued job."""
        self._clock.lap("train")
        while (version := self._train()) is not None:
            again = version.adapter in self._right
            self._right[version.adapter] = _RIGHT["second" if again else "first"]
            self._right[str(AdapterName.parse(version.adapter).at(version.id))] = self._right[version.adapter]
        self._clock.lap("pool")

    def answer_all(
        self,
        questions: Sequence[EvalQuestion],
        report: Callable[[int], None],
        keep: Callable[[int, EvalAnswer], None] = lambda index, answer: None,
    ) -> list[EvalAnswer | LoramillError]:
        """Answers from memory, a version more often right than the one before it."""
        self._clock.lap("evaluate")
        found = [
            EvalAnswer(right if self._random.random() < self._right.get(question.model, _RIGHT["base"]) else "no idea")
            for question in questions
            for right in [self._answers[question.messages[-1]["content"]]]
        ]
        self._clock.lap("pool")
        for index, answer in enumerate(found):
            keep(index, answer)
        return list(found)

    def _train(self) -> VersionRecord | None:
        with self._registry.writing() as session:
            job = jobs.lease(session, "pool", now=time.time(), seconds=60, max_attempts=1)
        if job is None:
            return None
        version = VersionRecord(
            id=self._registry.artifacts.put({"adapter_config.json": job.id.encode()}),
            adapter=job.spec.adapter,
            job=job.id,
            base=job.spec.base,
            bytes=9,
            created_at=time.time(),
        )
        with self._registry.writing() as session:
            jobs.publish(session, job.id, job.attempt, version)
        return version


def results(report: Callable[[str], object], adapters: int = ADAPTERS) -> list[Result]:
    """CPU seconds per adapter of two runs; takes about two minutes.

    Args:
        report: called with the name of each run before it begins.
        adapters: the number of adapters.

    Raises:
        JobError: a run did not decide on every adapter.
    """
    with tempfile.TemporaryDirectory(prefix="loramill-bench-") as home:
        settings = Settings.load(home=Path(home))
        migrate(settings.database)
        registry = Registry.open(settings.database, settings.artifacts)
        with registry.writing() as session:
            tenants.create(session, "bench")
        clock, answers = Clock(), dict[str, str]()
        pool = InstantPool(registry, clock, answers)
        found = []
        for examples, known, seed in ((FIRST, 0, 1), (NEW, FIRST, 2)):
            name = f"overhead: {examples} new examples" + (f" with {known} known" if known else "")
            report(f"{name}, {adapters} adapters")
            answers |= _add_data(registry, adapters, examples, random.Random(seed))
            seconds = _run(registry, settings, pool, clock, adapters)
            target = OVERHEAD_SECONDS if known else None
            found.append(Result(f"{name}, per adapter", sum(seconds.values()), "CPU-s", target))
            found += [Result(f"{name}, per adapter: {stage}", each, "CPU-s") for stage, each in seconds.items()]
        registry.close()
    return found


def _run(registry: Registry, settings: Settings, pool: InstantPool, clock: Clock, adapters: int) -> dict[str, float]:
    """CPU seconds per adapter by stage of one run."""
    clock.lap("preparation")
    clock.seconds.clear()
    definition = NightlyDefinition()
    run = run_nightly(registry, settings, report=clock.on_step, gateway=pool, definition=definition)
    clock.lap(STAGES[-1])
    publish_run(registry, settings, run, definition=definition)
    clock.lap("report")
    with registry.reading() as session:
        ended = nightly.list_steps(session, run.id, stage=STAGES[-1])
    if (decided := sum(step.status is StepStatus.DONE for step in ended)) != adapters:
        raise JobError(f"{adapters - decided} of {adapters} adapters reached no decision.")
    return {stage: clock.seconds[stage] / adapters for stage in (*STAGES, "report")}


def _add_data(registry: Registry, adapters: int, examples: int, letters: random.Random) -> dict[str, str]:
    """Adds random examples to the new data of each adapter; returns their answers by question."""
    answers: dict[str, str] = {}
    for adapter in range(adapters):
        rows = {" ".join(letters.choices(_WORDS, k=9)): " ".join(letters.choices(_WORDS, k=3)) for _ in range(examples)}
        raw = "".join(_row(*each) for each in rows.items()).encode()
        artifact = registry.artifacts.put({"data.jsonl": raw})
        with registry.writing() as session:
            file = datasets.create(session, "bench", "new.jsonl", artifact, len(raw), examples)
            nightly.add_data(session, AdapterName("bench", f"a{adapter}"), file.id, None)
        answers |= rows
    return answers


def _row(question: str, answer: str) -> str:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": messages}) + "\n"
