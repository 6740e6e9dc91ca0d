"""`python -m loramill.pipelines.join`: loramill on the Ray cluster that this machine is the head of.

Unlike `loramill up` it starts no Ray: it opens the record, deploys to the cluster that runs (see cluster.yaml) and
waits until it is interrupted. What it deployed stays; run again, it takes the place of what runs there.
"""

from __future__ import annotations

import logging
import signal

import ray

from loramill.local import admin_key, prepare_home
from loramill.pipelines.cluster import deploy
from loramill.registry.migrate import migrate
from loramill.settings import Settings

log = logging.getLogger(__name__)


def join(settings: Settings) -> None:
    """Brings the record up to date and deploys supervisor, gateway and engine.

    Raises:
        SetupError: the home or the record can't be used.
        ConnectionError: no Ray runs on this machine.
    """
    prepare_home(settings.home)
    migrate(settings.database)
    admin_key(settings)
    ray.init(address="auto", namespace="loramill")
    deploy(settings)


def main() -> None:
    """Joins, says where the gateway is, and waits for Ctrl-C or SIGTERM."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    stops = {signal.SIGINT, signal.SIGTERM}
    settings = Settings.load()
    join(settings)
    log.info("up at %s/v1, admin key in %s", settings.gateway, settings.admin_key_file)
    signal.pthread_sigmask(signal.SIG_BLOCK, stops)
    signal.sigwait(stops)


if __name__ == "__main__":
    main()
