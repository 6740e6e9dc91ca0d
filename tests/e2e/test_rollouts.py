"""A broken version under constant load on the real system: it is rolled back, and no request fails."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count, groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from loramill.models.catalog import Base
from loramill.pipelines.nightly.definition import NightlyDefinition
from loramill.pipelines.nightly.rollouts.introduce import introduction
from loramill.registry import Registry, adapters, nightly
from loramill.registry.rollouts import moves, records, traffic
from loramill.serve.model import load_decoder
from loramill.types import RolloutKind, RolloutOutcome, RolloutState
from loramill_bench.engine.harness import write_adapters

from ..waiting import eventually

QUESTIONS = ("Where is my order?", "How do I reset my password?", "Do you ship to Norway?", "Is it out of stock?")
log = logging.getLogger(__name__)
#: Users whose requests follow one after another.
USERS = 6


def messages(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def write_silent_adapter(base: Base, folder: Path) -> Path:
    """Writes an adapter that ends every answer before its first word.

    The last layer's `down_proj` has nearly the same input wherever an answer begins. A reads that direction, and B adds
    a direction in which the end of an answer is the most likely token.
    """
    tokenizer = AutoTokenizer.from_pretrained(base.folder)
    model = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32)
    layer = model.model.layers[-1].mlp.down_proj
    inputs: list[torch.Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0][0, -1]))
    with torch.inference_mode():
        for question in QUESTIONS:
            text = tokenizer.apply_chat_template(messages(question), add_generation_prompt=True, tokenize=False)
            model(**tokenizer(text, return_tensors="pt", add_special_tokens=False))
    hook.remove()
    mean = torch.stack(inputs).mean(0)
    head = (model.lm_head.weight * model.model.norm.weight).detach()
    centered = head - head.mean(0)
    spread = centered.T @ centered / len(head)
    # Whitened, since other tokens have longer embeddings in the direction of the end's own.
    end = torch.linalg.solve(
        spread + 0.01 * spread.diagonal().mean() * torch.eye(len(spread)), centered[tokenizer.eos_token_id]
    )
    name = f"base_model.model.model.layers.{len(model.model.layers) - 1}.mlp.down_proj"
    weights = {
        f"{name}.lora_A.weight": (mean / mean.dot(mean))[None],
        f"{name}.lora_B.weight": 3e4 * (end / end.norm())[:, None],
    }
    folder.mkdir()
    save_file({key: value.contiguous() for key, value in weights.items()}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 1, "lora_alpha": 1, "target_modules": ["down_proj"]}
    config["layers_to_transform"] = [len(model.model.layers) - 1]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@dataclass
class Load:
    """What constant load has seen so far: answers with user, version, text and time, and what failed."""

    answers: list[tuple[str, str, str, float]] = field(default_factory=list)
    failed: list[Exception] = field(default_factory=list)

    def since(self, number: int) -> list[tuple[str, str, str, float]]:
        return self.answers[number:]

    def after(self, moment: float) -> list[tuple[str, str, str, float]]:
        return [answer for answer in self.answers if answer[3] > moment]


@contextmanager
def load(mill, key: str, model: str) -> Iterator[Load]:
    """Users who ask again and again through the unmodified client, every second one with a stream."""
    seen, stop = Load(), threading.Event()

    def ask(number: int) -> None:
        options = {"model": model, "max_tokens": 6, "temperature": 0, "user": f"user {number}"}
        with mill.openai(key) as client:
            create = client.chat.completions.with_raw_response.create
            while not stop.is_set():
                try:
                    raw = create(
                        messages=messages(QUESTIONS[number % len(QUESTIONS)]), stream=number % 2 == 0, **options
                    )
                    parsed = raw.parse()
                    if number % 2 == 0:
                        text = "".join(each.choices[0].delta.content or "" for each in parsed if each.choices)
                    else:
                        text = parsed.choices[0].message.content or ""
                    seen.answers.append((f"user {number}", raw.headers["x-loramill-version"], text, time.time()))
                except Exception as error:  # noqa: BLE001 - the test shows it
                    seen.failed.append(error)

    with ThreadPoolExecutor(USERS) as pool:
        for number in range(USERS):
            pool.submit(ask, number)
        try:
            yield seen
        finally:
            stop.set()


#: Of tenants: an adapter's counts of the last ten minutes would be part of its next rollout.
NUMBERS = count()


@pytest.fixture
def versions(mill, base: Base, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str, str]:
    """A new adapter, a key of its tenant, and two versions: the champion, and a challenger that answers nothing."""
    folder = tmp_path_factory.mktemp("versions")
    torch.manual_seed(11)
    [good] = write_adapters(load_decoder(base.folder, dtype=torch.bfloat16, threads=1), folder, 1)
    tenant = f"initech-{next(NUMBERS)}"
    key, name = mill.tenant(tenant), f"{tenant}/help"
    with mill.client() as admin:
        for each in (good, write_silent_adapter(base, folder / "silent")):
            admin.adapters.import_folder(name, each)
        adapter = admin.adapters.get(name)
    assert adapter.champion is not None and adapter.challenger is not None
    return name, key, adapter.champion, adapter.challenger


def begin(registry: Registry, name: str, version: str, sections: dict[str, Any]) -> None:
    """Introduces a version as a nightly run does whose definition has these sections."""
    definition = NightlyDefinition.model_validate(sections).for_adapter(name)
    with registry.writing() as session:
        run = nightly.finish_run(session, nightly.open_run(session).id)
        how = introduction(definition.canary, definition.watch)
        moves.introduce(session, name, version, how, run=run.id, reason="it gains 0.100")


def newest(registry: Registry, name: str) -> RolloutState:
    with registry.reading() as session:
        return traffic.measured(session, records.list_rollouts(session, name=name)[0])


#: After which every answer is of the version that the aliases name; calls that had begun before have ended.
SETTLED_SECONDS = 4.0
WATCH = {"watch": {"window": "3m", "min_requests": 60}}


@pytest.mark.parametrize(
    ("sections", "kind"), [(WATCH, RolloutKind.WATCH), ({"canary": {"share": 0.6}, **WATCH}, RolloutKind.CANARY)]
)
def test_a_silent_version_is_rolled_back_within_its_window(mill, versions, sections: Any, kind: RolloutKind) -> None:
    name, key, champion, silent = versions
    registry = mill.registry
    with load(mill, key, name) as seen:
        eventually(lambda: len(seen.answers) >= 60, seconds=120)  # what a watch compares with
        begin(registry, name, silent, sections)
        begun, at = len(seen.answers), time.time()
        eventually(lambda: newest(registry, name).outcome is not None, seconds=240)
        settled = time.time() + SETTLED_SECONDS
        eventually(lambda: len(seen.after(settled)) >= 2 * USERS, seconds=120)
    assert seen.failed == []
    ended = newest(registry, name)
    assert (ended.kind, ended.outcome) == (kind, RolloutOutcome.ROLLED_BACK), ended.reason
    assert ended.ended_at is not None and ended.ends_at is not None and ended.ended_at < ended.ends_at
    assert "empty answers rose from 0.0%" in ended.reason
    tried = [(user, text) for user, version, text, _ in seen.since(begun) if version == silent]
    assert tried and {text for _, text in tried} == {""}
    if kind is RolloutKind.CANARY:  # each user has one version
        for tester in {user for user, _ in tried}:
            own = [version for user, version, _, _ in seen.answers if user == tester]
            assert [version for version, _ in groupby(own)] in ([champion, silent, champion], [silent, champion])
    assert {version for _, version, _, _ in seen.after(settled)} == {champion}
    with registry.reading() as session:
        found = adapters.get(session, name)
    assert found.champion == champion
    shown = mill.run("nightly", "status")
    assert "rolled back" in shown.stdout, shown.stderr
    log.info("%s: rolled back after %.1f s and %d answers of the silent version", kind, ended.ended_at - at, len(tried))


def test_a_rollback_by_hand_under_load_fails_no_request(mill, versions) -> None:
    name, key, champion, silent = versions
    with load(mill, key, name) as seen, mill.client(key) as client:
        client.adapters.promote(name, silent)
        eventually(lambda: bool(seen.answers) and seen.answers[-1][1] == silent, seconds=60)
        began = time.time()
        client.adapters.rollback(name)
        returned = time.time()
        eventually(lambda: len(seen.answers) > 0 and seen.answers[-1][1] == champion, seconds=60)
        eventually(lambda: len(seen.after(returned + SETTLED_SECONDS)) >= 2 * USERS, seconds=120)
    assert seen.failed == []
    assert {version for _, version, _, _ in seen.after(returned + SETTLED_SECONDS)} == {champion}
    late = max((at for _, version, _, at in seen.answers if version == silent), default=began)
    log.info(
        "rollback by hand: %.3f s; the version's last answer %.3f s after its begin", returned - began, late - began
    )
