"""The process of a scheduled run: `python -m loramill.pipelines.nightly.schedule.process`.

It reads its settings and the definition from standard input, and ends when that is closed, so that it can't outlive the
scheduler. Its memory is free again after the run. If it is killed, another process resumes the run.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Sequence

from loramill import logs
from loramill.errors import LoramillError, NightlyBusy
from loramill.pipelines.nightly.definition import NightlyDefinition
from loramill.pipelines.nightly.outcome import describe, outcomes, succeeded, summary
from loramill.pipelines.nightly.report.publish import publish_run
from loramill.pipelines.nightly.run import run_nightly
from loramill.registry import Registry, nightly
from loramill.settings import Settings
from loramill.types import NightlyRun, NightlyStep

#: Exit status of a run in which an adapter failed, and of one that was interrupted.
FAILED, INTERRUPTED = 1, 3
log = logging.getLogger("loramill.nightly")  # __name__ is __main__ in the process


def main() -> None:
    """Works on the open run until it ends, or until standard input does."""
    logs.configure()
    settings = Settings.model_validate_json(sys.stdin.readline())
    definition = NightlyDefinition.model_validate_json(sys.stdin.readline())
    threading.Thread(target=_end_with_input, name="stdin", daemon=True).start()
    sys.exit(work(settings, definition))


def work(settings: Settings, definition: NightlyDefinition) -> int:
    """Works on the open run; returns the exit status."""
    registry = Registry.open(settings.database, settings.artifacts)

    def log_step(step: NightlyStep) -> None:
        log.info("%s", describe(step))

    def publish(run: NightlyRun, deleted: Sequence[NightlyStep]) -> None:
        publish_run(registry, settings, run, deleted=deleted, definition=definition)

    try:
        run = run_nightly(registry, settings, definition=definition, report=log_step, publish=publish)
    except NightlyBusy as error:
        log.info("%s", error.message)
        return 0
    except LoramillError as error:
        log.error("the nightly run was interrupted and will be resumed: %s", error.message)
        return INTERRUPTED
    with registry.reading() as session:
        found = outcomes(nightly.list_steps(session, run.id))
    log.info("%s", summary(found))
    return 0 if succeeded(found) else FAILED


def _end_with_input() -> None:
    sys.stdin.read()
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    main()
