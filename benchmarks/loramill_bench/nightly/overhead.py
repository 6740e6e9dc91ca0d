"""The overhead of a nightly run per adapter: what it costs to collect new data, without training and evaluation."""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

from loramill.models.catalog import Base, find_base
from loramill.models.smollm2 import NAME
from loramill.names import AdapterName
from loramill.pipelines.nightly.collection.collect import collect_all
from loramill.pipelines.nightly.context import NightlyContext
from loramill.registry import Registry, datasets, migrate, nightly, tenants
from loramill.settings import Settings
from loramill.types import StepStatus
from loramill_bench.results import Result

#: CPU seconds per adapter for the whole run without training and evaluation.
OVERHEAD_SECONDS = 0.05
_ADAPTERS, _KNOWN, _NEW = 300, 500, 50
_WORDS = [
    f"{a}{b}{c}" for a in ("ka", "lo", "mi", "ru", "te") for b in ("n", "r", "st", "l") for c in ("a", "e", "o", "u")
]


def results(report: Callable[[str], object]) -> list[Result]:
    """CPU seconds per adapter of two collections, with a new SQLite registry; takes about two minutes.

    Args:
        report: Called with the name of each part before it runs.
    """
    base = find_base(NAME, Settings.load().cache)
    with tempfile.TemporaryDirectory() as home:
        settings = Settings.load(home=Path(home))
        migrate(settings.database)
        registry = Registry.open(settings.database, settings.artifacts)
        with registry.writing() as session:
            tenants.create(session, "bench")
        report(f"nightly: collect {_KNOWN} examples of each of {_ADAPTERS} adapters")
        first = _collect(registry, settings, base, _KNOWN, seed=1)
        report(f"nightly: collect {_NEW} new examples of each, with {_KNOWN} known ones")
        second = _collect(registry, settings, base, _NEW, seed=2)
        registry.close()
    return [
        Result(f"nightly: collect {_KNOWN} examples, per adapter", first, "CPU-s"),
        Result(f"nightly: collect {_NEW} examples with {_KNOWN} known, per adapter", second, "CPU-s", OVERHEAD_SECONDS),
    ]


def _collect(registry: Registry, settings: Settings, base: Base, examples: int, *, seed: int) -> float:
    """CPU seconds per adapter of the collection stage."""
    letters = random.Random(seed)
    with registry.writing() as session:
        run = nightly.open_run(session)
        for adapter in range(_ADAPTERS):
            raw = "".join(_row(letters) for _ in range(examples)).encode()
            artifact = registry.artifacts.put({"data.jsonl": raw})
            file = datasets.create(session, "bench", "new.jsonl", artifact, len(raw), examples)
            nightly.add_data(session, AdapterName("bench", f"a{adapter}"), file.id, None)
    context = NightlyContext(run, registry, settings, base, lambda step: None, Mock())
    begin = time.process_time()
    collect_all(context)
    seconds = time.process_time() - begin
    done = sum(step.status is StepStatus.DONE for step in context.steps("collect"))
    if done != _ADAPTERS:
        raise RuntimeError(f"{_ADAPTERS - done} of {_ADAPTERS} adapters were not collected")
    with registry.writing() as session:
        nightly.finish_run(session, run.id)
    return seconds / _ADAPTERS


def _row(letters: random.Random) -> str:
    question, answer = (" ".join(letters.choices(_WORDS, k=count)) for count in (9, 3))
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": messages}) + "\n"


def main() -> None:
    """Prints the results: `python -m loramill_bench.nightly.overhead`."""
    from loramill.cli.format import print_message

    for result in results(print_message):
        print_message(f"{result.case}: {result.value:.4f} {result.unit}")


if __name__ == "__main__":
    main()
