"""What a stage has found so far, in a file to which it appends: a process that ends early loses nothing."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from loramill_bench.results import Result


@dataclass(frozen=True, slots=True)
class Journal:
    """What a stage found.

    Attributes:
        results: its cases, without targets.
        notes: its remarks.
        failure: why it ended early, with a traceback; None if it did not.
        seconds: its duration; None if it did not end by itself.
    """

    results: list[Result] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failure: str | None = None
    seconds: float | None = None


def append(file: Path, entry: Result | dict[str, object]) -> None:
    """Appends a case, or a remark, failure or duration by its name."""
    line = {"result": asdict(entry)} if isinstance(entry, Result) else entry
    with file.open("a", encoding="utf-8") as opened:
        opened.write(json.dumps(line) + "\n")


def read(file: Path) -> Journal:
    """Reads what a stage has appended; a line that is cut short is left out."""
    journal = Journal()
    failure, seconds = None, None
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if "result" in entry:
            journal.results.append(Result(**entry["result"]))
        if "note" in entry:
            journal.notes.append(entry["note"])
        failure, seconds = entry.get("failure", failure), entry.get("seconds", seconds)
    return Journal(journal.results, journal.notes, failure, seconds)
