"""`logs/up.log`: the output of the processes of `loramill up`, in one format.

    2026-11-29 15:22:19,956 INFO gateway[8840] loramill.gateway: …

Processes have the names of their roles. `|` replaces the logger in lines without one, such as those of a traceback.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO

#: Size at which the file is rotated to `up.log.1`.
FILE_BYTES = 32 << 20
#: Lines that differ only in numbers are written at most MAX_REPEATS times per REPEAT_SECONDS.
MAX_REPEATS, REPEAT_SECONDS = 20, 10.0
#: Maximum number of lines of the first error to keep.
_MAX_ERROR_LINES = 200

_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
#: Prefix that Ray adds to a line of another process.
_RAY_PREFIX = re.compile(
    r"\((?:(?P<name>[^()]*?) )?pid=(?P<pid>\d+)(?:, ip=[^)]*)?\) |\((?P<part>raylet|gcs_server|autoscaler)[^)]*\) "
)
_TIME = r"(?P<time>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[,.]\d{3})\d*"
_LEVEL = r"(?P<level>DEBUG|INFO|WARNING|ERROR|CRITICAL|FATAL)"
_LINE_FORMATS = tuple(
    re.compile(form)
    for form in (
        rf"{_TIME}\s+{_LEVEL} (?P<logger>[\w.]+): (?P<message>.*)",  # loramill.logs
        rf"{_TIME}\s+{_LEVEL} (?P<logger>[\w.]+\.py):\d+ -- (?P<message>.*)",  # Ray
        rf"{_LEVEL} {_TIME} (?P<logger>\S+) \S+ (?:\S+ )?-- (?P<message>.*)",  # Ray Serve
        rf"\[{_TIME} (?P<level>[DIWECF])(?: \d+)+\] (?:\(\S+\) )?(?P<logger>\S+\.(?:cc|h)):\d+: (?P<message>.*)",
    )
)
_LEVELS = {
    "D": "DEBUG",
    "I": "INFO",
    "W": "WARNING",
    "E": "ERROR",
    "C": "CRITICAL",
    "F": "CRITICAL",
    "FATAL": "CRITICAL",
}
_TRACEBACK = "Traceback (most recent call last)"
_PROCESS_NAMES = {
    "Supervisor": "supervisor",
    "ServeController": "serve",
    "TrainController": "train",
    "RayTrainWorker": "session",
}
#: Harmless line that Ray logs whenever a cluster ends.
_NOISE = re.compile(r"Task ServeController\.graceful_shutdown failed\. There are infinite retries remaining")


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One line of the log; `logger` is "|" if it continues the previous line."""

    time: str
    level: str
    process: str
    logger: str
    message: str

    def __str__(self) -> str:
        colon = "" if self.logger == "|" else ":"
        return f"{self.time} {self.level} {self.process} {self.logger}{colon} {self.message}".rstrip()

    @property
    def is_error(self) -> bool:
        """Whether the level is ERROR or CRITICAL."""
        return self.level in ("ERROR", "CRITICAL")

    @property
    def is_startup(self) -> bool:
        """Whether it comes from the start-up of the cluster; other processes recover from the errors they log."""
        if self.process.startswith("cluster"):
            return self.logger == "|" or self.logger.startswith(("loramill", "ray.serve"))
        return self.logger == "ray.controller"  # Ray Serve's controller, which logs why a replica failed


class LogParser:
    """Parses the output of processes into entries."""

    def __init__(self, pid: int, clock: Callable[[], float] = time.time) -> None:
        self._pid, self._clock = pid, clock
        self._tracebacks: dict[str, str] = {}  # process -> "in" a traceback, or "behind" its exception

    def parse(self, text: str) -> LogEntry | None:
        """Parses one line; returns None for an empty or harmless line."""
        text = _ESCAPE.sub("", text).rstrip().rpartition("\r")[2]  # keeps the last state of a progress bar
        prefix = _RAY_PREFIX.match(text)
        process = self._process(prefix)
        message = text[prefix.end() :] if prefix else text
        if not message.strip() or _NOISE.search(message):
            return None
        for form in _LINE_FORMATS:
            if found := form.match(message):
                level = _LEVELS.get(found["level"], found["level"])
                self._tracebacks.pop(process, None)
                when = found["time"].replace(".", ",")
                return LogEntry(when, level, process, _logger(found["logger"]), found["message"])
        return LogEntry(self._now(), self._level(process, message), process, "|", message)

    def _level(self, process: str, message: str) -> str:
        """Returns ERROR for the lines of a traceback, its exception and its causes, otherwise INFO."""
        if _TRACEBACK in message:
            self._tracebacks[process] = "in"
        elif process not in self._tracebacks:
            return "INFO"
        elif not message.startswith(" "):
            if self._tracebacks[process] == "behind":
                del self._tracebacks[process]
                return "INFO"
            self._tracebacks[process] = "behind"
        return "ERROR"

    def _process(self, prefix: re.Match[str] | None) -> str:
        if prefix is None:
            return f"cluster[{self._pid}]"
        if prefix["part"]:
            return prefix["part"]
        name = prefix["name"] or "worker"
        if name.startswith("ServeReplica:"):
            name = name.rpartition(":")[2]
        return f"{_PROCESS_NAMES.get(name, name)}[{prefix['pid']}]".replace(" ", "-")

    def _now(self) -> str:
        now = self._clock()
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now)) + f",{int(now * 1000) % 1000:03}"


def _logger(name: str) -> str:
    return name if name.partition(".")[0] in ("loramill", "__main__") else f"ray.{name}"


@dataclass(slots=True)
class _Repeat:
    entry: LogEntry
    since: float
    count: int = 0


@dataclass(slots=True)
class RepeatFilter:
    """Suppresses and counts repeated lines."""

    clock: Callable[[], float] = time.monotonic
    _seen: dict[tuple[str, str], _Repeat] = field(default_factory=dict)

    def push(self, entry: LogEntry) -> list[LogEntry]:
        """Adds an entry; returns the entries to write."""
        over = self.expire()
        # Lines of loramill that differ only in a number may concern different jobs; lines of libraries do not.
        same = entry.message if entry.logger.startswith("loramill") else re.sub(r"\d+", "0", entry.message)
        seen = self._seen.setdefault((entry.process, same), _Repeat(entry, self.clock()))
        seen.entry, seen.count = entry, seen.count + 1
        return over if seen.count > MAX_REPEATS else [*over, entry]

    def expire(self, *, all_: bool = False) -> list[LogEntry]:
        """Returns the counts of suppressed lines whose interval has ended."""
        now, counts = self.clock(), []
        for key, seen in list(self._seen.items()):
            if all_ or now - seen.since > REPEAT_SECONDS:
                del self._seen[key]
                if seen.count > MAX_REPEATS:
                    counts.append(_repeat_summary(seen, now - seen.since))
        return counts


def _repeat_summary(seen: _Repeat, seconds: float) -> LogEntry:
    more = seen.count - MAX_REPEATS
    return replace(seen.entry, message=f"{seen.entry.message} [{more} more of these in {seconds:.0f} s]")


class ClusterLog:
    """Copies a process's output to the log file until it ends, and keeps the first error.

    Attributes:
        reason: The first error in one line, or None.
        failed: Whether that error comes from the start-up of the cluster, so that waiting is useless.
    """

    def __init__(self, path: Path, pipe: IO[bytes], pid: int) -> None:
        self.reason: str | None = None
        self.failed = False
        self._path, self._pipe = path, pipe
        self._reader, self._repeats = LogParser(pid), RepeatFilter()
        self._first: list[LogEntry] = []
        self._open = False  # whether further lines of the first error may follow
        self._thread = threading.Thread(target=self._run, name="up.log", daemon=True)
        self._thread.start()

    def close(self, seconds: float) -> None:
        """Waits up to this long for the end of the pipe, which an orphaned process may keep open."""
        self._thread.join(seconds)

    def _run(self) -> None:
        for raw in self._pipe:
            if entry := self._reader.parse(raw.decode(errors="replace")):
                self._remember_error(entry)
                self._write(self._repeats.push(entry))
        self._write(self._repeats.expire(all_=True))

    def _write(self, entries: list[LogEntry]) -> None:
        if not entries:
            return
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(f"{entry}\n" for entry in entries)
                full = file.tell() > FILE_BYTES
            if full:
                self._path.replace(f"{self._path}.1")
        except OSError as error:  # the pipe must still be read, or the processes block
            self.reason = self.reason or f"{self._path} can't be written ({error.strerror})."

    def _remember_error(self, entry: LogEntry) -> None:
        """Keeps the first error with its traceback, preferably one from start-up."""
        if entry.is_error and (not self._first or (entry.is_startup and not self.failed)):
            self._first, self._open, self.failed = [entry], True, entry.is_startup
        elif self._open and entry.process == self._first[0].process:
            self._open = entry.logger == "|" and len(self._first) < _MAX_ERROR_LINES
            if self._open:
                self._first.append(entry)
        else:
            return
        self.reason = error_line([each.message for each in self._first])


def error_line(lines: list[str]) -> str:
    """Returns the most informative line of an error: the exception of a traceback, otherwise the first line."""
    if any(line.startswith(_TRACEBACK) for line in lines):
        ends = [line for line in lines if not line.startswith((" ", _TRACEBACK)) and ": " in line]
        # Errors of loramill are whole sentences.
        return re.sub(r"^loramill\.errors\.\w+: ", "", (ends or lines)[-1])
    return lines[0]
