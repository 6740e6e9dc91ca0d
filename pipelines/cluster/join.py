"""Deploys loramill on the Ray cluster whose head is this machine: see cluster.yaml."""

from __future__ import annotations

import ray

from loramill.errors import SetupError
from loramill.local.processes import check_stores, ensure_admin_key, prepare_home
from loramill.pipelines.cluster.deploy import deploy
from loramill.registry.database.migrate import migrate
from loramill.settings import Settings


def join(settings: Settings) -> None:
    """Migrates the database, and deploys supervisor, gateways and engines in place of those that run there.

    Unlike `up`, this does not start Ray, and the deployments remain when this process ends.

    Raises:
        SetupError: no Ray runs on this machine, or the home, the stores or the registry cannot be used.
    """
    prepare_home(settings.home)
    check_stores(settings)
    migrate(settings.database)
    ensure_admin_key(settings)
    try:
        ray.init(address="auto", namespace="loramill")
    except ConnectionError as error:
        raise SetupError("No Ray cluster runs on this machine; start one (`ray up cluster.yaml`).") from error
    deploy(settings)
