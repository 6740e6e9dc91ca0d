"""The log of `loramill up`: one format, no endless repetition, and the first error."""

from __future__ import annotations

import io
import logging
import re
from pathlib import Path

import pytest

from loramill import logs
from loramill.local import up_log
from loramill.local.up_log import ClusterLog, LogEntry, LogParser, RepeatFilter, error_line

LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (INFO|WARNING|ERROR|CRITICAL) [\w-]+(\[\d+\])? \S+ .+")


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (
            "2026-11-29 15:22:17,312\tINFO worker.py:2038 -- Started a local Ray instance.",
            "2026-11-29 15:22:17,312 INFO cluster[7] ray.worker.py: Started a local Ray instance.",
        ),
        (
            'INFO 2026-11-29 15:22:19,956 serve 8574 -- Started Serve in namespace "serve".',
            '2026-11-29 15:22:19,956 INFO cluster[7] ray.serve: Started Serve in namespace "serve".',
        ),
        (
            "\x1b[36m(ServeReplica:loramill:engine pid=31)\x1b[0m 2026-11-29 15:22:20,250 WARNING loramill.kernels: x",
            "2026-11-29 15:22:20,250 WARNING engine[31] loramill.kernels: x",
        ),
        (
            "\x1b[36m(ServeController pid=8751)\x1b[0m INFO 2026-11-29 15:22:20,250 controller 8751 -- Adding.",
            "2026-11-29 15:22:20,250 INFO serve[8751] ray.controller: Adding.",
        ),
        (
            "(RayTrainWorker pid=9, ip=10.0.0.2) 2026-11-29 15:22:20,250 INFO loramill.jobs.worker: job a: attempt 1",
            "2026-11-29 15:22:20,250 INFO session[9] loramill.jobs.worker: job a: attempt 1",
        ),
        (
            "[2026-11-29 15:22:20,250 E 10 12] (raylet) node_manager.cc:3212: no memory",
            "2026-11-29 15:22:20,250 ERROR cluster[7] ray.node_manager.cc: no memory",
        ),
        ("\x1b[33m(raylet)\x1b[0m a bare line", "2001-09-09 01:46:40,000 INFO raylet | a bare line"),
        ("10%|#   |\r20%|##  |\r", "2001-09-09 01:46:40,000 INFO cluster[7] | 20%|##  |"),
        ("(not a process) a bare line", "2001-09-09 01:46:40,000 INFO cluster[7] | (not a process) a bare line"),
    ],
)
def test_all_log_formats_become_one(written: str, read: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(up_log.time, "localtime", up_log.time.gmtime)
    entry = LogParser(7, clock=lambda: 1e9).parse(f"{written}\n")
    assert str(entry) == read and LINE.fullmatch(read)


def test_a_traceback_is_an_error_of_the_process_that_wrote_it() -> None:
    reader = LogParser(7)
    lines = [
        "Traceback (most recent call last):",
        '  File "a.py"',
        "RuntimeError: Traceback (most recent call last):",
        '  File "b.py"',
        "ZeroDivisionError: x",
        "Starting a worker",
    ]
    entries = [reader.parse(f"(Supervisor pid=3) {line}") for line in lines]
    assert [each and each.level for each in entries] == [*["ERROR"] * 5, "INFO"]
    assert [each and each.process for each in (*entries, reader.parse("else"))] == [
        *["supervisor[3]"] * 6,
        "cluster[7]",
    ]


def test_what_ray_logs_at_every_shutdown_is_left_out() -> None:
    noise = "(raylet) Task ServeController.graceful_shutdown failed. There are infinite retries remaining, so …"
    assert LogParser(7).parse(noise) is None and LogParser(7).parse("\x1b[0m\n") is None


def entry(message: str, logger: str = "ray.serve") -> LogEntry:
    return LogEntry("2026-11-29 15:22:20,250", "WARNING", "gateway[1]", logger, message)


def test_a_flood_is_counted_instead_of_written() -> None:
    now = [0.0]
    repeats = RepeatFilter(clock=lambda: now[0])
    written = [each for number in range(5000) for each in repeats.push(entry(f"attempt {number} failed"))]
    assert len(written) == up_log.MAX_REPEATS
    now[0] += up_log.REPEAT_SECONDS + 1
    counted, other = repeats.push(entry("something else"))
    assert counted.message == "attempt 4999 failed [4980 more of these in 11 s]"
    assert other.message == "something else"


def test_lines_about_different_jobs_are_all_written() -> None:
    repeats = RepeatFilter(clock=lambda: 0.0)
    jobs = [entry(f"job {number}: attempt 1", "loramill.jobs.worker.worker") for number in range(200)]
    assert [each for job in jobs for each in repeats.push(job)] == jobs


def test_the_first_error_is_the_reason_not_the_noise_of_the_end(tmp_path: Path) -> None:
    text = """\
[2026-11-29 15:22:19,000 E 10 12] (raylet) agent.cc:12: could not export metrics
(ServeReplica:loramill:engine pid=5) 2026-11-29 15:22:20,000 INFO loramill.engine: loading
ERROR 2026-11-29 15:22:21,000 controller 8 -- Exception in the constructor of Replica(id='a'):
Traceback (most recent call last):
  File "engine.py", line 1, in <module>
    raise BaseUnusable
loramill.errors.BaseUnusable: config.json has no "vocab_size".

The above exception was the direct cause of the following exception:
ERROR 2026-11-29 15:22:25,000 controller 8 -- Something else failed at the end.
2026-11-29 15:22:26,000 INFO loramill.cluster: stopping
"""
    log = ClusterLog(tmp_path / "up.log", io.BytesIO(text.encode()), 7)
    log.close(10)
    assert log.failed and log.reason == 'config.json has no "vocab_size".'
    lines = (tmp_path / "up.log").read_text().splitlines()
    assert len(lines) == 10 and all(LINE.fullmatch(line) for line in lines)


def test_an_internal_error_of_ray_alone_does_not_end_a_start(tmp_path: Path) -> None:
    text = b"(raylet) [2026-11-29 15:22:19,000 E 10 12] agent.cc:12: could not export metrics\n"
    log = ClusterLog(tmp_path / "up.log", io.BytesIO(text), 7)
    log.close(10)
    assert not log.failed and log.reason == "could not export metrics"


def test_a_message_without_a_traceback_is_its_own_reason() -> None:
    assert error_line(["The port is taken.", "more", "and: more"]) == "The port is taken."


def test_a_full_log_is_moved_and_an_unwritable_one_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(up_log, "FILE_BYTES", 2000)
    text = "".join(f"2026-11-29 15:22:26,000 INFO loramill.cluster: line {number}\n" for number in range(60))
    ClusterLog(tmp_path / "up.log", io.BytesIO(text.encode()), 7).close(10)
    both = (tmp_path / "up.log.1").read_text() + (tmp_path / "up.log").read_text()
    assert both.splitlines()[-1].endswith("line 59") and (tmp_path / "up.log").stat().st_size < 2100
    unwritable = ClusterLog(tmp_path / "nowhere" / "up.log", io.BytesIO(text.encode()), 7)
    unwritable.close(10)
    assert unwritable.reason is not None and "can't be written" in unwritable.reason


def test_log_lines_of_processes_have_time_level_and_logger(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = logging.getLogger()
    bare = logging.StreamHandler()  # as Ray Train leaves it in a session
    monkeypatch.setattr(root, "handlers", [bare])
    logs.configure()
    logging.getLogger("loramill.jobs.worker.worker").info("job a: attempt 1")
    logging.getLogger("alembic.runtime.plugins").info("setup plugin alembic.autogenerate.schemas")
    logging.getLogger("bitsandbytes.backends.cpu.ops").warning("Failed to load CPU gemm_4bit_forward")
    [line] = capsys.readouterr().err.splitlines()
    assert str(LogParser(7).parse(line)).endswith("INFO cluster[7] loramill.jobs.worker.worker: job a: attempt 1")
