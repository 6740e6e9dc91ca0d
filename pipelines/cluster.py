"""The whole system on one Ray cluster: the Serve application and the jobs' supervisor.

`python -m loramill.pipelines.cluster` is the child process of `loramill up`: settings come as one
line of JSON on standard input, and the end of that input is the signal to stop.
"""

from __future__ import annotations

import logging
import sys
import threading

import ray
from ray import serve

import loramill.jobs.supervisor
import loramill.serve.deployments
from loramill.bases import find_base
from loramill.errors import LoramillError
from loramill.settings import Settings

OBJECT_STORE_BYTES = 128 << 20

#: What a session on this machine takes of Ray's CPUs. Not a whole one: a Train controller that is killed leaves its
#: placement group behind until the supervisor finds it, and a few of those would leave no room for sessions.
NOMINAL_CPUS = 0.01
log = logging.getLogger(__name__)


def deploy(settings: Settings) -> None:
    """Starts or updates everything on the Ray cluster this process is connected to."""
    loramill.jobs.supervisor.deploy(settings)
    loramill.serve.deployments.deploy(settings)


def start_local() -> None:
    """Starts a Ray of this machine's own. Its CPUs stand for nothing: what runs here is bounded by the settings."""
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        namespace="loramill",
        log_to_driver=True,
    )


def wait_for_end(ended: threading.Event) -> None:
    """Sets `ended` when standard input has ended."""
    sys.stdin.read()
    ended.set()


def main() -> None:
    """Runs a local cluster until standard input ends; why it could not is the last line on standard error."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    settings = Settings.model_validate_json(sys.stdin.readline())
    try:
        find_base(settings.base, settings.cache, settings.quantization)
    except LoramillError as error:
        sys.exit(error.message)
    ended = threading.Event()
    threading.Thread(target=wait_for_end, args=(ended,), name="stdin", daemon=True).start()
    start_local()
    deploy(settings.model_copy(update={"jobs": settings.jobs.model_copy(update={"cpus": NOMINAL_CPUS})}))
    log.info("up")
    ended.wait()
    log.info("stopping")
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
