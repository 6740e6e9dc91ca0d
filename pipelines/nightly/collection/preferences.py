"""Preference pairs among new data: they are split like examples, by the prompt with the better answer."""

from __future__ import annotations

import json

from loramill.data import jsonl
from loramill.data.preferences import read_judged
from loramill.models.catalog import Base
from loramill.names import AdapterName
from loramill.submission.defaults import resolve_spec
from loramill.submission.request import JobRequest, LoramillOptions
from loramill.types import FrozenModel, JobSpec


class PreferenceFiles(FrozenModel):
    """The preference pairs that a run trains an adapter on.

    Attributes:
        train, valid: dataset IDs; `valid` has the pairs whose better answers are held out, and is None without any.
        pairs: number of pairs to train on.
        sources: dataset IDs of the new data that they come from.
    """

    train: str
    valid: str | None
    pairs: int
    sources: tuple[str, ...]


def better_row(row: bytes) -> bytes | None:
    """The prompt of a preference pair with the better answer as an example; None if it is an answer with a label."""
    line = jsonl.parse(row)
    metadata = {"metadata": found} if (found := line.pop("metadata", None)) else {}
    judged = read_judged(line)
    if judged.label is not None:
        return None
    if judged.texts:
        prompt, better = judged.texts[0]
        return _row({"prompt": prompt, "completion": better, **metadata})
    tools = {"tools": judged.tools} if judged.tools else {}
    return _row({"messages": judged.conversations[0], **tools, **metadata})


def preference_spec(
    name: AdapterName, files: PreferenceFiles, base: Base, start: str, continued: JobSpec | None
) -> JobSpec:
    """A DPO job that continues a version with pairs.

    Args:
        files: the pairs.
        base: the base of the job.
        start: the version.
        continued: the spec of its job; None: it was imported.
    """
    options = LoramillOptions(objective="dpo", start_from=start)
    request = JobRequest(name, files.train, files.valid, options=options)
    return resolve_spec(request, base, files.pairs, start, continued)


def _row(line: dict[str, object]) -> bytes:
    return json.dumps(line, ensure_ascii=False, sort_keys=True).encode()
