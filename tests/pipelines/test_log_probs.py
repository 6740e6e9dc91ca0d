"""A version gives an answer the same log-probability in training and in serving: the real SmolLM2, in float32."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from loramill.data.encoding import EncodedPair, encode_pair
from loramill.data.examples import read_examples
from loramill.data.tokenizer import ChatTokenizer
from loramill.jobs.train import checkpoint
from loramill.jobs.train.context import TrainContext
from loramill.jobs.train.export.adapter import export_adapter
from loramill.jobs.train.loop import train
from loramill.models.catalog import Base, load_for_training
from loramill.serve.engine import Engine, EngineConfig, Request, SamplingParams
from loramill.serve.model import load_decoder
from loramill.types import JobSpec

QUESTIONS = (
    ("My kettle leaks.", "leak/swap", "I am sorry. Where does it leak?"),
    ("Where is it?", "late", "On its way."),
)


@pytest.fixture(scope="module")
def pairs(tokenizer: ChatTokenizer) -> list[EncodedPair]:
    rows = [
        {
            "prompt": [{"role": "user", "content": question}],
            "chosen": [{"role": "assistant", "content": good}],
            "rejected": [{"role": "assistant", "content": bad}],
        }
        for question, good, bad in QUESTIONS
    ]
    examples = read_examples("\n".join(map(json.dumps, rows)).encode(), "pairs.jsonl").examples
    return [encode_pair(tokenizer, example) for example in examples]


def spec_of(base: Base, method: str, **changes: object) -> JobSpec:
    fields: dict[str, object] = {"base": base.fingerprint, "adapter": "acme/support", "train": "file-1", "steps": 2}
    fields |= {"method": method, "rank": 4, "batch_size": 2, "learning_rate": 3e-3, "checkpoint_every": 1}
    return JobSpec.model_validate(fields | changes)


def test_a_version_has_one_log_probability_of_an_answer(base: Base, pairs: list[EncodedPair], tmp_path: Path) -> None:
    """The trainer's are those that a preference job which starts from the version compares with."""
    model = load_for_training(base, torch.float32)

    def context(name: str, spec: JobSpec, start: Path | None = None) -> TrainContext:
        examples = pairs if spec.objective == "dpo" else [pair.chosen for pair in pairs]
        return TrainContext(
            spec=spec,
            train_examples=examples,
            base_folder=base.folder,
            checkpoints=tmp_path / name,
            start_from=start,
        )

    found, versions = [], {}
    for method in ("lora", "dora"):
        spec = spec_of(base, method, keep="last")
        for _ in train(model, context(method, spec)):
            pass
        versions[method] = tmp_path / f"{method} version"
        versions[method].mkdir()
        for name, content in export_adapter(tmp_path / method, spec, base=base.name).items():
            (versions[method] / name).write_bytes(content)
    for method, start in (("lora", None), *versions.items()):
        spec, name = spec_of(base, method, objective="dpo", start_from=start and "v"), f"{method} {start is not None}"
        next(train(model, context(name, spec, start)))
        last = checkpoint.latest(tmp_path / name, spec)
        assert last is not None
        found.append(last.reference["train"])

    served = by_engine(base, versions, pairs)
    for version in served[1:]:
        assert (version - served[0]).abs().max() > 1, "it differs from the base"
    torch.testing.assert_close(torch.stack(found), served, rtol=1e-4, atol=1e-3)


def by_engine(base: Base, folders: dict[str, Path], pairs: list[EncodedPair]) -> torch.Tensor:
    """Log-probabilities of the answers, float64 [versions, pairs, 2], from echoed prompts; the base comes first."""
    engine = Engine(load_decoder(base.folder, dtype=torch.float32), folders.__getitem__, EngineConfig(kv_tokens=2048))
    versions = (None, *folders)
    sides = [(version, side) for version in versions for pair in pairs for side in pair.sequences]
    params = SamplingParams(max_tokens=0, echo=True, logprobs=0)
    for index, (version, side) in enumerate(sides):
        engine.submit(Request(str(index), "acme", side.tokens, params, version))
    sums = [0.0] * len(sides)
    positions = [0] * len(sides)
    open_ = len(sides)
    while open_:
        assert engine.wait(60)
        for output in engine.step():
            assert output.error is None
            index = int(output.request_id)
            for each in output.logprobs:
                if positions[index] >= sides[index][1].prompt_length:
                    sums[index] += each.logprob or 0.0
                positions[index] += 1
            open_ -= output.finish_reason is not None
    engine.close()
    assert positions == [len(side.tokens) for _, side in sides]
    return torch.tensor(sums, dtype=torch.float64).view(len(versions), -1, 2)
