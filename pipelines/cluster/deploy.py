"""The whole system on one Ray cluster: the Serve application and the jobs' supervisor.

`python -m loramill.pipelines.cluster.deploy` is the child process of `loramill up`: settings come as one
line of JSON on standard input, and the end of that input is the signal to stop.
"""

from __future__ import annotations

import logging
import sys
import threading
from pathlib import Path

import ray
from ray import serve

import loramill.jobs.ray.supervisor
import loramill.serve.deployments
from loramill import logs
from loramill.errors import LoramillError, SetupError
from loramill.gpus.machine import list_gpus
from loramill.local.machine import object_store_folder
from loramill.models.catalog import find_base
from loramill.pipelines.nightly.rollouts.advance import start_deciding
from loramill.pipelines.nightly.schedule.scheduler import start_scheduler
from loramill.plural import counted
from loramill.settings import Settings

OBJECT_STORE_BYTES = 128 << 20

#: CPUs in Ray of a session on this machine. Not a whole one: a Train controller that is killed leaves its placement
#: group until the supervisor finds it, and a few of those would leave no CPUs for sessions.
NOMINAL_CPUS = 0.01
#: How long the schedule of nightly runs may take to end the process of a run.
SCHEDULE_STOP_SECONDS = 10.0
log = logging.getLogger("loramill.cluster")  # __name__ is __main__ here


def deploy(settings: Settings) -> None:
    """Starts or updates everything on the Ray cluster of this process."""
    supervisor = loramill.jobs.ray.supervisor.deploy(settings)  # its process starts while Serve does
    loramill.serve.deployments.deploy(settings)
    loramill.jobs.ray.supervisor.wait_ready(supervisor)


def start_local(scratch: Path) -> None:
    """Starts Ray on this machine. Its number of CPUs does not matter: the settings bound what runs here.

    Args:
        scratch: a folder on disk for Ray's object store, in case shared memory is too small for it.
    """
    store = object_store_folder(OBJECT_STORE_BYTES, scratch)
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        namespace="loramill",
        log_to_driver=True,
        **({} if store is None else {"_plasma_directory": str(store)}),
    )


def check_ray_gpus(settings: Settings) -> None:
    """Checks that Ray counts all GPUs of this machine: without them, engines and sessions would wait forever.

    Raises:
        SetupError: it counts fewer.
    """
    if settings.serve.device != "cuda" and not settings.jobs.on_gpu:
        return
    reported, found = len(list_gpus()), int(ray.cluster_resources().get("GPU", 0))
    if found < reported:
        raise SetupError(
            f"nvidia-smi reports {counted(reported, 'GPU')}, and Ray finds {found}, by libnvidia-ml.so.1: check that "
            "this library belongs to the driver (in a container, NVIDIA_DRIVER_CAPABILITIES has to contain utility). "
            "To use the CPU, set serve.device to cpu and jobs.use_gpu to false."
        )


def wait_for_end(ended: threading.Event) -> None:
    """Sets `ended` when standard input has ended."""
    sys.stdin.read()
    ended.set()


def main() -> None:
    """Runs a local cluster until standard input ends; on failure, standard error begins with the reason."""
    logs.configure()
    settings = Settings.model_validate_json(sys.stdin.readline())
    try:
        run(settings)
    except LoramillError as error:
        log.critical(error.message)
        sys.exit(1)


def run(settings: Settings) -> None:
    """Runs a local cluster until standard input ends."""
    find_base(settings.base, settings.cache, settings.quantization)
    ended = threading.Event()
    threading.Thread(target=wait_for_end, args=(ended,), name="stdin", daemon=True).start()
    start_local(settings.home / "run")
    check_ray_gpus(settings)
    deploy(settings.model_copy(update={"jobs": settings.jobs.model_copy(update={"cpus": NOMINAL_CPUS})}))
    schedule, stop_schedule = start_scheduler(settings)
    rollouts = start_deciding(settings, ended)
    log.info("up")
    ended.wait()
    log.info("stopping")
    stop_schedule.set()
    schedule.join(SCHEDULE_STOP_SECONDS)
    rollouts.join(SCHEDULE_STOP_SECONDS)
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
