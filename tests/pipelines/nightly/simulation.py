"""Tenants whose labels follow from words, a trainer that counts words, and the gateway that its versions answer at."""

from __future__ import annotations

import json
import random
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from loramill.data.examples import read_examples
from loramill.data.tokenizer import ChatTokenizer
from loramill.models.catalog import Base
from loramill.names import AdapterName
from loramill.pipelines.nightly import run, train
from loramill.pipelines.nightly.outcome import Outcome, outcomes
from loramill.pipelines.nightly.questions import EvalAnswer, EvalQuestion, Keep
from loramill.registry import Registry, adapters, datasets, jobs, nightly, tenants
from loramill.settings import Settings
from loramill.types import JobSpec, VersionRecord

from ...databases import create_sqlite_database

TWELVE = tuple(f"tenant-{number:02}/intent" for number in range(12))
LABELS = ("billing", "travel", "weather")
_SYLLABLES = ("ba", "ce", "di", "fe", "gu", "ka", "le", "mi", "no", "pu", "ra", "se", "ti", "vo", "zu")
_FILE = "adapter_config.json"

Counts = dict[str, dict[str, int]]


class Simulation:
    """A registry in a folder, with a pool and a gateway; several processes may open the same folder."""

    def __init__(self, folder: Path) -> None:
        self.settings = Settings.load(home=folder)
        self.registry = Registry.open(f"sqlite:///{folder / 'loramill.db'}", (folder / "artifacts").as_uri())
        self.trained: list[str] = []
        self.check: Callable[[], None] = self.train_queued
        self.publish: run.Publish = lambda run, deleted: None
        self._models: dict[str, Counts] = {}

    def run(self) -> dict[str, Outcome]:
        """A nightly run; the outcomes by adapter."""
        found = run.run_nightly(self.registry, self.settings, gateway=self, publish=self.publish)  # type: ignore[arg-type]
        with self.registry.reading() as session:
            return {each.adapter: each for each in outcomes(nightly.list_steps(session, found.id))}

    def feed(self, adapter: str, rows: Iterable[Mapping[str, Any] | bytes], filename: str = "rows.jsonl") -> None:
        """Adds a file to the new data of an adapter."""
        name = AdapterName.parse(adapter)
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        raw = b"\n".join(lines) + b"\n"
        artifact = self.registry.artifacts.put({"data.jsonl": raw})
        with self.registry.writing() as session:
            file = datasets.create(session, name.tenant, filename, artifact, len(raw), len(lines))
            nightly.add_data(session, name, file.id, None)

    def champion(self, adapter: str) -> str | None:
        """The champion of an adapter."""
        with self.registry.reading() as session:
            return adapters.get(session, adapter).champion

    def train_queued(self) -> None:
        """Trains all queued jobs."""
        while True:
            with self.registry.writing() as session:
                job = jobs.lease(session, "worker", now=time.time(), seconds=60, max_attempts=1)
            if job is None:
                return
            content = json.dumps({"adapter": job.spec.adapter, "counts": self._learned(job.spec)}, sort_keys=True)
            version = VersionRecord(
                id=self.registry.artifacts.put({_FILE: content.encode()}),
                adapter=job.spec.adapter,
                job=job.id,
                base=job.spec.base,
                bytes=len(content),
                created_at=time.time(),
            )
            with self.registry.writing() as session:
                jobs.publish(session, job.id, job.attempt, version)
            self.trained.append(job.spec.adapter)

    def answer_all(
        self, questions: Sequence[EvalQuestion], report: Callable[[int], None], keep: Keep = lambda index, answer: None
    ) -> list[EvalAnswer]:
        """What the versions predict; the base knows no label."""
        answers = [EvalAnswer(self._predict(each.model, str(each.messages[-1]["content"]))) for each in questions]
        for index, answer in enumerate(answers):
            keep(index, answer)
        return answers

    def _learned(self, spec: JobSpec) -> Counts:
        """How often each word occurred with each label, in the data and in what training starts from."""
        with self.registry.reading() as session:
            file = datasets.get(session, spec.train)
        counts = defaultdict[str, Counter[str]](Counter)
        for word, each in (self._counts(spec.start_from) if spec.start_from else {}).items():
            counts[word].update(each)
        for example in read_examples(self.registry.artifacts.read(file.artifact, "data.jsonl"), "rows").examples:
            for word in set(str(example.messages[-2]["content"]).lower().split()):
                counts[word][example.completion] += 1
        return {word: dict(each) for word, each in counts.items()}

    def _counts(self, version: str) -> Counts:
        if version not in self._models:
            self._models[version] = json.loads(self.registry.artifacts.read(version, _FILE))["counts"]
        return self._models[version]

    def _predict(self, model: str, question: str) -> str:
        adapter, _, version = model.partition("@")
        if not version:
            return "unknown"
        with self.registry.reading() as session:
            counts = self._counts(adapters.resolve(session, AdapterName.parse(adapter), version).id)
        scores = Counter[str]()
        for word in question.lower().split():
            seen = counts.get(word, {})
            for label, count in seen.items():
                scores[label] += round(1e6 * (count / (sum(seen.values()) + 2)) ** 3)
        return max(sorted(scores), key=lambda label: scores[label], default="unknown")


def simulate(folder: Path, base: Base, tokenizer: ChatTokenizer, patch: pytest.MonkeyPatch) -> Simulation:
    """Creates a simulation with twelve tenants in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    create_sqlite_database(f"sqlite:///{folder / 'loramill.db'}")
    patch_runs(patch, base, tokenizer)
    simulation = Simulation(folder)
    (folder / "nightly.yaml").write_text("split: {held_out: 0.3}\n")
    with simulation.registry.writing() as session:
        for adapter in TWELVE:
            tenants.create(session, adapter.partition("/")[0])
    return simulation


def patch_runs(patch: pytest.MonkeyPatch, base: Base, tokenizer: ChatTokenizer) -> None:
    """Runs get a base and its tokenizer, and do not wait between two looks at their jobs."""
    patch.setattr(run, "find_base", lambda *_: base)
    patch.setattr(ChatTokenizer, "load", lambda *_: tokenizer)
    patch.setattr(train.time, "sleep", lambda seconds: None)


def labeled(adapter: str, batch: int, *, words_of: int | None = None, count: int = 60) -> list[dict[str, Any]]:
    """Examples of an adapter whose label follows from one word; each batch has other words, or those of another."""
    chance = random.Random(f"{adapter} {batch}")
    seed = f"{adapter} {words_of or batch}"
    words = {label: [_word(random.Random(f"{seed} {label} {number}")) for number in range(3)] for label in LABELS}
    rows = []
    for number in range(count):
        label = LABELS[number % len(LABELS)]
        text = [_word(chance) for _ in range(6)]
        text.insert(chance.randrange(7), words[label][number // len(LABELS) % 3])
        rows.append(example(" ".join(text), label))
    return rows


def example(question: str, answer: str) -> dict[str, Any]:
    """A row of data."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def shuffled(rows: Sequence[Mapping[str, Any]], seed: int) -> list[dict[str, Any]]:
    """The same questions with the labels of others."""
    answers = [row["messages"][1]["content"] for row in rows]
    random.Random(seed).shuffle(answers)
    return [example(row["messages"][0]["content"], answer) for row, answer in zip(rows, answers, strict=True)]


def respelled(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with another case and other spaces."""
    question, answer = (message["content"] for message in row["messages"])
    return example(re.sub(" ", "  ", question.upper()), answer)


def _word(chance: random.Random) -> str:
    return "".join(chance.choice(_SYLLABLES) for _ in range(4))
