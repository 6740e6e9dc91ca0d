"""An adapter's past: the data of its champion, and the content that was trained on or held out before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from sqlalchemy.orm import Session

from loramill.data import jsonl
from loramill.data.examples import read_row
from loramill.errors import BaseUnusable, NotFound
from loramill.models.catalog import Base
from loramill.names import SHORT_HASH_LENGTH, AdapterName
from loramill.pipelines.nightly.collection.division import Division
from loramill.pipelines.nightly.collection.fingerprint import Fingerprint, digest, fingerprints
from loramill.pipelines.nightly.collection.relation import Known
from loramill.pipelines.nightly.definition import SplitDefinition
from loramill.registry import ArtifactStore, adapters, content, datasets, jobs
from loramill.types import ContentSide, JobSpec, VersionRecord

#: Versions whose data is replayed. Each file has replayed rows of the ones before, so that older data is not lost.
LINEAGE = 30


@dataclass(frozen=True, slots=True)
class Past:
    """The champion of an adapter, with its job and what still exists of its data.

    Attributes:
        champion: the version; None before the first promotion.
        previous: the champion before it; None if it belongs to another base, so that it cannot be served.
        job: the spec of its job; None if it was imported or deleted.
        files: IDs of the training datasets of examples that it and the versions that it continues were trained on,
            newest first.
        valid: ID of the validation dataset of the newest of these jobs; None if deleted.
    """

    champion: str | None = None
    previous: str | None = None
    job: JobSpec | None = None
    files: tuple[str, ...] = ()
    valid: str | None = None


def find_past(session: Session, name: AdapterName, base: Base) -> Past:
    """Finds the champion and its data.

    Raises:
        BaseUnusable: the champion belongs to another base.
        NotFound: the adapter does not exist.
    """
    adapter = adapters.get(session, name)
    champion, previous = adapter.champion, adapter.previous
    if previous and adapters.get_version(session, previous).base != base.fingerprint:
        previous = None
    specs = list(_lineage(session, _version(session, name, champion, base))) if champion else []
    job = specs[0] if specs and specs[0] is not None else None
    # Preferences are not trained together with answers.
    taught = [spec for spec in specs if spec is not None and spec.objective == "sft"]
    valid = taught[0].valid if taught else None
    trained = list(dict.fromkeys(spec.train for spec in taught))
    existing = datasets.example_counts(session, [*trained, *([valid] if valid else [])])
    files = tuple(file for file in trained if file in existing)
    return Past(champion, previous, job, files, valid if valid in existing else None)


def _lineage(session: Session, version: VersionRecord) -> Iterator[JobSpec | None]:
    """The specs of the jobs of a version and of those that it continues, newest first, at most `LINEAGE`.

    It ends with None at a version that was imported, and without it at one that was deleted.
    """
    for _ in range(LINEAGE):
        spec = jobs.get(session, version.job).spec if version.job else None
        yield spec
        if spec is None or spec.start_from is None:
            return
        try:
            version = adapters.get_owned_version(session, spec.adapter, spec.start_from)
        except NotFound:
            return


def record_past(session: Session, artifacts: ArtifactStore, name: AdapterName, past: Past) -> None:
    """Records the content of the champion's data, if no nightly run has frozen it.

    Its validation file counts as held out, even where it has examples of the training file: they are not trained on any
    more, and the champion's advantage on them fades.
    """
    held = [(past.valid, ContentSide.HELD_OUT)] if past.valid else []
    for dataset, side in (*held, *((file, ContentSide.TRAIN) for file in past.files)):
        if content.is_recorded(session, name, dataset):
            continue
        other_side = {each.digest for each in content.list_content(session, name) if each.side is not side}
        rows = read_rows(session, artifacts, dataset)
        found = fingerprints([read_row(row, line) for line, row in enumerate(rows, 1)])
        new = {each.digest: each.sketch.tobytes() for each in found if each.digest not in other_side}
        content.record(session, name, side, list(new.items()), dataset=dataset, run=None)


def known_content(session: Session, name: AdapterName, side: ContentSide | None = None) -> Known:
    """The examples of an adapter whose side was decided, or those of one side."""
    found = content.list_content(session, name, side)
    return Known(
        [Fingerprint(each.digest, np.frombuffer(each.sketch, "<u4")) for each in found],
        [each.side for each in found],
        [each.used for each in found],
    )


def old_rows(session: Session, artifacts: ArtifactStore, past: Past) -> list[bytes]:
    """The rows that the champion and the versions that it continues were trained on, newest first, each once.

    Those in which a champion's answer was replayed are among them: `originals` leaves them out.
    """
    return list(dict.fromkeys(row for file in past.files for row in read_rows(session, artifacts, file)))


def originals(known: Known) -> Callable[[bytes], bool]:
    """Returns whether a row was trained on as it arrived, rather than with a champion's answer in its place."""
    trained = {each.digest for each, side in zip(known.examples, known.sides, strict=True) if side is ContentSide.TRAIN}
    return lambda row: digest(read_row(row, 1)) in trained


def known_division(
    session: Session, artifacts: ArtifactStore, past: Past, known: Known, old: Sequence[bytes], split: SplitDefinition
) -> Division | None:
    """The sides of the values that `split.by` divides rows by, as earlier runs decided them; None: it is not set.

    A value that the champion's validation data has, and no data that it was trained on, is held out.
    """
    if split.by is None:
        return None
    division = Division(split.by, split.held_out)
    before = read_rows(session, artifacts, past.valid) if past.valid else []
    validated, trained = (
        {division.key(read_row(row, line).metadata) for line, row in enumerate(rows, 1)} for rows in (before, old)
    )
    held = dict.fromkeys((key for key in validated - trained if key is not None), ContentSide.HELD_OUT)
    decided = {each.digest: side for each, side in zip(known.examples, known.sides, strict=True)}
    return replace(division, sides=held | decided)


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
