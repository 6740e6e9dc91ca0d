"""Measures the scores that `gate.py` resamples, and writes them to `scores.json`: numbers only, no text.

For each tenant, a champion is trained on half of the training data. Challengers continue from it: on the other half,
with different seeds, and on it with shuffled answers. All of them, and the base, answer the test questions.

    python -m loramill_bench.nightly.measure_scores FOLDER TENANT…
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from loramill.cli.format import print_message
from loramill.data.encoding import encode_example
from loramill.data.examples import Example, read_examples
from loramill.data.tokenizer import ChatTokenizer
from loramill.jobs.train.context import TrainContext, TrainingProgress
from loramill.jobs.train.engine import Driver, TrainingEngine, Work
from loramill.jobs.train.export.adapter import export_adapter
from loramill.jobs.train.forward import configured_forward
from loramill.jobs.train.loop import TrainingRun, open_run
from loramill.models.catalog import Base, find_base, load_for_training
from loramill.models.smollm2 import NAME
from loramill.pipelines.compare.answers import EngineAnswerer, answer_limits
from loramill.pipelines.compare.measure import write_files
from loramill.pipelines.nightly.text_metrics import normalized, token_f1
from loramill.serve.offline import OfflineEngine
from loramill.settings import ServeSettings, Settings
from loramill.sizing.tenants import PASS_TOKENS
from loramill.types import JobSpec

FILE = Path(__file__).parent / "scores.json"
#: Of the champion; challengers train for half as many steps, at half the learning rate, as the nightly run does.
STEPS, LEARNING_RATE, BATCH_SIZE, RANK = 30, 2e-3, 8, 8
#: Seeds of the challengers on data of the old distribution.
SEEDS = (1, 2)

#: A training: its examples, its seed, and the adapter that it continues.
Run = tuple[Sequence[Example], int, Path | None]
Scores = dict[str, dict[str, list[float]]]


def measure(base: Base, folder: Path) -> dict[str, Scores]:
    """Trains and scores one tenant's candidates.

    Returns:
        By references ("test", or "shuffled": answers that belong to other questions), metric and candidate: the score
        of each example.
    """
    tokenizer = ChatTokenizer.load(base.folder)
    train, test = (read_examples((folder / f"{name}.jsonl").read_bytes(), name).examples for name in ("train", "test"))
    old, new = train[::2], train[1::2]
    shuffled = [
        replace(each, messages=(*each.messages[:-1], other.messages[-1]), completion=other.completion)
        for each, other in zip(new, _shuffled(new), strict=True)
    ]
    with tempfile.TemporaryDirectory(prefix="loramill-bench-") as name:
        scratch = Path(name)
        model = load_for_training(base, torch.bfloat16)
        adapters = _train(base, model, tokenizer, scratch, {"champion": (old, 0, None)})
        start = adapters["champion"]
        runs: dict[str, Run] = {f"challenger {seed}": (new, seed, start) for seed in SEEDS}
        adapters |= _train(base, model, tokenizer, scratch, runs | {"spoiled": (shuffled, 3, start)})
        del model
        with OfflineEngine(base, Path, ServeSettings(threads=1)) as engine:
            limits = answer_limits(test, tokenizer)
            answers = {
                candidate: EngineAnswerer(engine, None if path is None else str(path)).answer(
                    test, limits, lambda done: None
                )
                for candidate, path in {"base": None, **adapters}.items()
            }
    references = {"test": [each.completion for each in test]}
    references["shuffled"] = [each.completion for each in _shuffled(test)]
    return {name: _score(answers, expected) for name, expected in references.items()}


def _shuffled(examples: Sequence[Example]) -> list[Example]:
    return random.Random(0).sample(list(examples), len(examples))


def _train(
    base: Base, model: object, tokenizer: ChatTokenizer, scratch: Path, runs: Mapping[str, Run]
) -> dict[str, Path]:
    """Trains adapters next to each other; returns their folders."""
    specs, tokens = {}, PASS_TOKENS["cpu"]
    driver: Driver[None] = Driver(TrainingEngine(model), tokens)
    with configured_forward(model, tokens), ExitStack() as stack:
        for name, (examples, seed, start) in runs.items():
            continued = start is not None
            specs[name] = JobSpec(
                base=base.fingerprint,
                adapter="bench/bot",
                train="train",
                rank=RANK,
                alpha=2 * RANK,
                seed=seed,
                steps=STEPS // 2 if continued else STEPS,
                learning_rate=LEARNING_RATE / 2 if continued else LEARNING_RATE,
                batch_size=BATCH_SIZE,
                checkpoint_every=STEPS,
                keep="last",
            )
            context = TrainContext(
                spec=specs[name],
                train_examples=[encode_example(tokenizer, each) for each in examples],
                base_folder=base.folder,
                checkpoints=scratch / f"{name} checkpoints",
                start_from=start,
            )
            driver.start(name, name, _all_steps(name, stack.enter_context(open_run(model, context))))
        while len(driver):
            for ended in driver.run_pass(1.0):
                if ended.error is not None:
                    raise ended.error
    return {
        name: write_files(export_adapter(scratch / f"{name} checkpoints", spec, base=base.name), scratch / name)
        for name, spec in specs.items()
    }


def _all_steps(name: str, run: TrainingRun) -> Work[None]:
    while not run.state.finished:
        progress: TrainingProgress = yield from run.advance()
        print_message(f"{name}: step {progress.step} of {progress.total_steps}, loss {progress.loss:.3f}")


def _score(answers: Mapping[str, Sequence[str]], references: Sequence[str]) -> Scores:
    def exact_match(answer: str, reference: str) -> float:
        return float(normalized(answer) == normalized(reference))

    return {
        metric: {
            candidate: [round(score(*pair), 3) for pair in zip(texts, references, strict=True)]
            for candidate, texts in answers.items()
        }
        for metric, score in {"exact_match": exact_match, "token_f1": token_f1}.items()
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    chosen = find_base(NAME, Settings.load().cache)
    measured = json.loads(FILE.read_text()) if FILE.exists() else {}
    for tenant in sys.argv[2:]:
        measured[tenant] = measure(chosen, Path(sys.argv[1], tenant))
        FILE.write_text(json.dumps(measured) + "\n")
