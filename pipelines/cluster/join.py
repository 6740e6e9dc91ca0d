"""loramill on the Ray cluster that this machine is the head of: see cluster.yaml."""

from __future__ import annotations

import ray

from loramill.errors import SetupError
from loramill.local.processes import check_stores, ensure_admin_key, prepare_home
from loramill.pipelines.cluster.deploy import deploy
from loramill.registry.database.migrate import migrate
from loramill.settings import Settings


def join(settings: Settings) -> None:
    """Brings the record up to date and deploys supervisor, gateway and engine, in place of those that run there.

    Unlike `up` it starts no Ray, and what it deployed stays when this process ends.

    Raises:
        SetupError: no Ray runs on this machine, or the home, the stores or the registry can't be used.
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
