"""Deploys loramill on the Ray cluster whose head is this machine: see cluster.yaml."""

from __future__ import annotations

import logging

import ray

from loramill.errors import SettingsInvalid, SetupError
from loramill.local.preparation import check_stores, ensure_admin_key, prepare_home
from loramill.pipelines.cluster import nightly_schedule
from loramill.pipelines.cluster.deploy import deploy
from loramill.registry.database.migrate import migrate
from loramill.settings import Settings

log = logging.getLogger("loramill.cluster")


def join(settings: Settings) -> None:
    """Migrates the database, and deploys supervisor, gateways and engines in place of those that run there.

    Unlike `up`, this does not start Ray, and the deployments remain when this process ends.

    Raises:
        SetupError: no Ray runs on this machine, the settings do not decide what runs on the cluster's GPUs, or the
            home, the stores or the registry cannot be used.
    """
    prepare_home(settings.home)
    check_stores(settings)
    migrate(settings.database)
    ensure_admin_key(settings)
    try:
        ray.init(address="auto", namespace="loramill")
    except ConnectionError as error:
        raise SetupError("No Ray cluster runs on this machine; start one (`ray up cluster.yaml`).") from error
    check_devices(settings, ray.cluster_resources().get("GPU", 0))
    deploy(settings)
    nightly_schedule.deploy(settings)


def check_devices(settings: Settings, gpus: float) -> None:
    """Checks that the settings of a cluster with GPUs decide what runs on them.

    "auto" would have to depend on the nodes that are running at the moment, and nodes with GPUs may start on demand.

    Args:
        settings: the settings.
        gpus: number of GPUs of the running nodes.

    Raises:
        SettingsInvalid: there are GPUs, and a setting is "auto"; the message names the variables to set.
    """
    undecided = {
        "LORAMILL_SERVE__DEVICE to cuda or cpu": settings.serve.device == "auto",
        "LORAMILL_JOBS__USE_GPU to true or false": settings.jobs.use_gpu == "auto",
    }
    names = [name for name, auto in undecided.items() if auto]
    if names and gpus:
        raise SettingsInvalid(f"The cluster has {gpus:.0f} GPUs. Decide what runs on them: set {' and '.join(names)}.")
    for name in names:
        log.info("the cluster's CPUs are used; to use GPUs of nodes that start later, set %s", name)
