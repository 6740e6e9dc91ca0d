"""An adapter's past: the data of its champion, and the content that was trained on or held out before."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from sqlalchemy.orm import Session

from loramill.data import jsonl
from loramill.data.examples import read_row
from loramill.errors import BaseUnusable
from loramill.models.catalog import Base
from loramill.names import SHORT_HASH_LENGTH, AdapterName
from loramill.pipelines.nightly.collection.fingerprint import Fingerprint, fingerprints
from loramill.pipelines.nightly.collection.relation import Known
from loramill.registry import ArtifactStore, adapters, content, datasets, jobs
from loramill.types import ContentSide, JobSpec, VersionRecord


@dataclass(frozen=True, slots=True)
class Past:
    """The champion of an adapter, with its job and what still exists of its data.

    Attributes:
        champion: the version; None before the first promotion.
        previous: the champion before it; None if it belongs to another base, so that it cannot be served.
        job: the spec of its job; None if it was imported or deleted.
        train, valid: dataset IDs; None if deleted, or if the job learned preferences.
    """

    champion: str | None = None
    previous: str | None = None
    job: JobSpec | None = None
    train: str | None = None
    valid: str | None = None


def find_past(session: Session, name: AdapterName, base: Base) -> Past:
    """Finds the champion and its data.

    Raises:
        BaseUnusable: the champion belongs to another base.
        NotFound: there is no such adapter.
    """
    adapter = adapters.get(session, name)
    champion, previous = adapter.champion, adapter.previous
    if previous and adapters.get_version(session, previous).base != base.fingerprint:
        previous = None
    origin = _version(session, name, champion, base).job if champion else None
    job = jobs.get(session, origin).spec if origin else None
    # Preferences are not trained together with answers.
    files = (job.train, job.valid) if job and job.objective == "sft" else (None, None)
    existing = datasets.example_counts(session, filter(None, files))
    train, valid = (file if file in existing else None for file in files)
    return Past(champion, previous, job, train, valid)


def record_past(session: Session, artifacts: ArtifactStore, name: AdapterName, past: Past) -> None:
    """Records the content of the champion's data, if no nightly run has frozen it.

    Its validation file counts as held out, even where it has examples of the training file: they are not trained on any
    more, and the champion's advantage on them fades.
    """
    for dataset, side in ((past.valid, ContentSide.HELD_OUT), (past.train, ContentSide.TRAIN)):
        if dataset is None or content.is_recorded(session, name, dataset):
            continue
        other_side = {each.digest for each in content.list_content(session, name) if each.side is not side}
        rows = read_rows(session, artifacts, dataset)
        found = fingerprints([read_row(row, line) for line, row in enumerate(rows, 1)])
        new = {each.digest: each.sketch.tobytes() for each in found if each.digest not in other_side}
        content.record(session, name, side, list(new.items()), dataset=dataset, run=None)


def known_content(session: Session, name: AdapterName) -> Known:
    """The examples of an adapter whose side was decided."""
    found = content.list_content(session, name)
    return Known(
        [Fingerprint(each.digest, np.frombuffer(each.sketch, "<u4")) for each in found],
        [each.side for each in found],
        [each.used for each in found],
    )


def read_rows(session: Session, artifacts: ArtifactStore, dataset: str) -> list[bytes]:
    """The rows of a dataset."""
    return jsonl_rows(artifacts.read(datasets.get(session, dataset).artifact, "data.jsonl"))


def jsonl_rows(raw: bytes) -> list[bytes]:
    """The rows of a JSONL file, without blank lines and byte order marks."""
    return [row for _, row in jsonl.iter_rows(raw)]


def _version(session: Session, name: AdapterName, champion: str, base: Base) -> VersionRecord:
    """The champion, which must belong to the base in use, since training continues from its weights.

    Raises:
        BaseUnusable: it belongs to another base.
    """
    version = adapters.get_version(session, champion)
    if version.base != base.fingerprint:
        short = SHORT_HASH_LENGTH
        raise BaseUnusable(
            f"The champion {champion[:short]} of '{name}' was trained on another base ({version.base[:short]}) than "
            f"the one in use, {base.name} ({base.fingerprint[:short]}): set `base` to that one again, or submit a job "
            f"for '{name}' and promote its version."
        )
    return version
