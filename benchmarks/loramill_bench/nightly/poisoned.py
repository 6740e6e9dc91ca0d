"""Three nightly runs over twelve real tenants: from nothing, new data for half of them, and poisoned data for three.

Real training and real answers. The data of the third run is poisoned by shuffled labels, by held-out examples that are
respelled, and by broken rows; exactly these adapters must keep their champions.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loramill.errors import InvalidRequest
from loramill.models.catalog import Base
from loramill.names import AdapterName
from loramill.pipelines.nightly.definition import NightlyDefinition
from loramill.pipelines.nightly.outcome import Outcome, Verdict, outcomes
from loramill.pipelines.nightly.run import run_nightly
from loramill.registry import Registry, datasets, nightly
from loramill.settings import Settings
from loramill_bench.nightly.local_pool import TENANT, LocalPool, add_data, scratch_registry
from loramill_bench.results import Result

#: Tenants that get examples of new labels, in half of the runs or in all.
GROWING = (
    "clinc-banking",
    "clinc-travel",
    "clinc-credit-cards",
    "clinc-kitchen-dining",
    "clinc-auto-commute",
    "clinc-utility",
    "clinc-meta",
    "banking77",
)
#: Tenants that get data in the first run, and poisoned data or none in the third.
STEADY = ("hwu-play", "hwu-calendar", "snips-get-weather", "sgd-weather1")
SHUFFLED, LEAKED, BROKEN = "clinc-travel", "hwu-play", "snips-get-weather"
#: Examples per adapter and run, and the share of them that is held out.
EXAMPLES, HELD_OUT = 100, 0.3
_BAD = (b"{", b'{"messages": []}', b"\xff\xfe", b'{"prompt": "Q", "completion": ""}', b"[1, 2]")
#: How a run ends for an adapter whose champion stays.
_KEPT = {Verdict.HELD, Verdict.REJECTED, Verdict.SKIPPED, Verdict.FAILED}


@dataclass(frozen=True, slots=True)
class Batches:
    """A tenant's rows for three runs, each of labels that the batches before it do not have, and more of the first."""

    rows: tuple[tuple[bytes, ...], ...]
    more: tuple[bytes, ...]


def results(base: Base, folder: Path, report: Callable[[str], object]) -> list[Result]:
    """How many adapters keep and change their champions as they should; takes about 40 minutes of CPU time.

    Args:
        base: the base.
        folder: contains a folder per tenant with train.jsonl.
        report: called with the name of each run before it begins, and with the outcome of each adapter.

    Raises:
        InvalidRequest: a tenant's file is missing.
    """
    torch.set_num_threads(1)
    began = time.process_time()
    data = {name: read_batches(folder / name, labels=name in GROWING) for name in (*GROWING, *STEADY)}
    with scratch_registry() as (registry, settings):
        pool = LocalPool(base, registry, settings)
        first = _run(registry, settings, pool, "first", {name: each.rows[0] for name, each in data.items()}, report)
        grown = GROWING[: len(data) // 2]
        second = _run(registry, settings, pool, "second", {name: data[name].rows[1] for name in grown}, report)
        clean = [name for name in GROWING if name != SHUFFLED]
        new = {name: data[name].rows[2 if name in grown else 1] for name in clean}
        poisoned = {
            SHUFFLED: tuple(shuffled(data[SHUFFLED].more, random.Random(0))),
            LEAKED: tuple(map(respelled, _held_out(registry, LEAKED))),
            BROKEN: _BAD * 6,
        }
        third = _run(registry, settings, pool, "third", new | poisoned, report)
    name, promoted = f"poisoned data, {len(data)} tenants", {Verdict.PROMOTED}
    shares = {
        "first versions that became champions": (_share(first, data, promoted), 1.0),
        "second run, promoted of the adapters with new data": (_share(second, grown, promoted), None),
        "third run, promoted of the clean adapters": (_share(third, clean, promoted), 1.0),
        "third run, poisoned adapters that kept their champions": (_share(third, poisoned, _KEPT), 1.0),
    }
    rows = [
        Result(f"{name}: {case}", share, "of adapters", target, "higher") for case, (share, target) in shares.items()
    ]
    return [*rows, Result(f"{name}: three runs", time.process_time() - began, "CPU-s")]


def read_batches(folder: Path, *, labels: bool) -> Batches:
    """Divides a tenant's rows into batches, each of other labels if its answers are labels.

    Raises:
        InvalidRequest: the file is missing.
    """
    try:
        rows = (folder / "train.jsonl").read_bytes().splitlines()
    except FileNotFoundError as error:
        raise InvalidRequest(f"{error.filename} is missing: name the folder that has it.", param="tenants") from error
    answers = [_answer(json.loads(row)) for row in rows]
    known = sorted(set(answers))
    parts = [set(known[start::3]) if labels else set(known) for start in range(3)]
    own = [[row for row, answer in zip(rows, answers, strict=True) if answer in part] for part in parts]
    taken = [tuple(part[:EXAMPLES]) for part in own]
    return Batches(tuple(taken), tuple(own[0][EXAMPLES : 2 * EXAMPLES]))


def shuffled(rows: Sequence[bytes], order: random.Random) -> list[bytes]:
    """The same questions with the answers of others."""
    parsed = [json.loads(row) for row in rows]
    answers = [_answer(each) for each in parsed]
    order.shuffle(answers)
    return [_row(each["messages"][:-1], answer) for each, answer in zip(parsed, answers, strict=True)]


def respelled(row: bytes) -> bytes:
    """A row with another case and other spaces."""
    *before, question, answer = json.loads(row)["messages"]
    text = question["content"].upper().replace(" ", "  ")
    return _row([*before, {"role": "user", "content": text}], answer["content"])


def _answer(row: Mapping[str, Any]) -> str:
    return str(row["messages"][-1]["content"])


def _row(messages: Sequence[Mapping[str, Any]], answer: str) -> bytes:
    return json.dumps({"messages": [*messages, {"role": "assistant", "content": answer}]}).encode()


def _held_out(registry: Registry, tenant: str) -> list[bytes]:
    """The rows that the first run held out."""
    with registry.reading() as session:
        first = nightly.list_runs(session)[-1]
        steps = nightly.list_steps(session, first.id, stage="collect")
        collected = next(step.result for step in steps if step.adapter == str(AdapterName(TENANT, tenant)))
        artifact = datasets.get(session, collected["slices"]["new"]).artifact
    return registry.artifacts.read(artifact, "data.jsonl").splitlines()


def _run(
    registry: Registry,
    settings: Settings,
    pool: LocalPool,
    which: str,
    data: Mapping[str, Sequence[bytes]],
    report: Callable[[str], object],
) -> dict[str, Outcome]:
    """The outcomes of a run with new data, by tenant."""
    report(f"poisoned data, the {which} run")
    for tenant, rows in data.items():
        add_data(registry, AdapterName(TENANT, tenant), rows)
    definition = NightlyDefinition.model_validate({"split": {"held_out": HELD_OUT}})
    run = run_nightly(registry, settings, gateway=pool, definition=definition)
    with registry.reading() as session:
        found = outcomes(nightly.list_steps(session, run.id))
    for each in found:
        report(f"{each.adapter}: {each.verdict}: {each.reason}")
    return {AdapterName.parse(each.adapter).adapter: each for each in found}


def _share(found: Mapping[str, Outcome], names: Collection[str], verdicts: Collection[Verdict]) -> float:
    return sum(name in found and found[name].verdict in verdicts for name in names) / len(names)
