"""The composition root: gateways and engine replicas as one Ray Serve application."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray import serve

from loramill import logs
from loramill.gpus import GPU_ALLOCATOR, ONLY_ASSIGNED_GPUS, ray_share
from loramill.serve.autoscaling.ray_policy import UNDELAYED
from loramill.serve.replica.engine_deployment import EngineDeployment
from loramill.serve.transport.http_server import HttpServer
from loramill.settings import ServeSettings, Settings

if TYPE_CHECKING:
    from fastapi import FastAPI

    from loramill.serve.api.dependencies import ServedBase
    from loramill.serve.transport.channel import Receiver

log = logging.getLogger(__name__)

APP = "loramill"
ENGINE = "engine"

#: Places gateways with a port of their own on the head node, where clients expect the port.
HEAD_NODE_RESOURCE = {"node:__internal_head__": 0.001}

#: This code does not block its event loop, so that Serve needs no second one: that saves some milliseconds per call.
SINGLE_LOOP_ENV = {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0", "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0"}


class GatewayDeployment:
    """A gateway replica behind Serve's proxy; `gateway_builder` builds its app in the replica."""

    def __init__(self, *engines: Any) -> None:
        self._engines = engines  # Serve starts the deployments that one is bound to first


class ListeningGateway:
    """A gateway replica with an HTTP port of its own."""

    async def __init__(self, settings: Settings, *engines: Any) -> None:  # type: ignore[misc]  # Serve awaits it
        self._engines = engines
        serve_ = settings.serve
        self._listener = HttpServer(
            gateway_builder(settings)(), serve_.host, serve_.port, drain_seconds=serve_.drain_seconds
        )
        await self._listener.start()

    async def check_health(self) -> None:
        """Raises if the port is not served; Serve then replaces the gateway."""
        self._listener.check()

    async def __del__(self) -> None:
        """Called by Serve at the end: accepts no more connections, and completes the open responses."""
        await self._listener.drain()


def gateway_builder(settings: Settings) -> Callable[[], FastAPI]:
    """Returns the function that builds a gateway's app in its replica; the app itself is not pickled."""

    def build() -> FastAPI:
        # The process that deploys does without these imports, which take 0.8 s of CPU.
        from loramill.data.encoding import limitations
        from loramill.data.tokenizer import ChatTokenizer
        from loramill.registry import Registry
        from loramill.serve.api.app import build_api
        from loramill.serve.api.middleware import access_log
        from loramill.serve.transport.channel import Receiver

        logs.configure()
        access_log.open_access_log(settings.home / "logs")
        receiver = Receiver()
        first, *others = (_served(name, each, receiver) for name, each in engine_settings(settings).items())
        tokenizer = ChatTokenizer.load(first.base.folder)
        for limit in limitations(tokenizer):
            log.warning("%s", limit)
        app = build_api(
            registry=Registry.open(settings.database, settings.artifacts),
            base=first.base,
            tokenizer=tokenizer,
            backend=first.backend,
            settings=settings,
            other_bases=others,
        )
        gc.collect()
        gc.freeze()  # as in an engine replica: collecting garbage among these objects stops all streams
        return app

    return build


def _served(deployment: str, settings: Settings, receiver: Receiver) -> ServedBase:
    from loramill.models.catalog import find_base
    from loramill.serve.api.dependencies import ServedBase
    from loramill.serve.transport.handle import HandleBackend

    backend = HandleBackend(
        serve.get_deployment_handle(deployment, APP),
        receiver,
        start_seconds=settings.serve.start_seconds,
        scales_to_zero=settings.serve.min_replicas == 0,
    )
    return ServedBase(find_base(settings.base, settings.cache, settings.quantization), backend)


def engine_settings(settings: Settings) -> dict[str, Settings]:
    """The settings of the engine deployments by name, one per base that is served."""
    others = settings.serve.bases
    return {ENGINE: settings} | {f"{ENGINE}-{Path(base).name}": _additional_base(settings, base) for base in others}


def _additional_base(settings: Settings, base: str) -> Settings:
    """The settings of an additional base: it starts without replicas."""
    return settings.model_copy(update={"base": base, "serve": settings.serve.model_copy(update={"min_replicas": 0})})


def application(settings: Settings) -> Any:
    """Builds the Serve application: gateways in front of the engine replicas of each base."""
    fixed = settings.model_copy(update={"serve": with_fixed_device(settings.serve)})
    behind = [_engine_deployment(name, each).bind(each) for name, each in engine_settings(fixed).items()]
    options = _options(settings) | {"name": "gateway", "num_replicas": settings.serve.gateways}
    environment = SINGLE_LOOP_ENV | ONLY_ASSIGNED_GPUS | metrics_env(settings)
    options["ray_actor_options"] = {"num_cpus": 0.1, "runtime_env": {"env_vars": environment}}
    if settings.serve.ingress == "direct":
        options["ray_actor_options"]["resources"] = HEAD_NODE_RESOURCE
        return serve.deployment(ListeningGateway, **options).bind(settings, *behind)
    return serve.deployment(serve.ingress(gateway_builder(settings))(GatewayDeployment), **options).bind(*behind)


def _engine_deployment(name: str, settings: Settings) -> Any:
    routing = {
        "request_router_class": "loramill.serve.routing.ray_router.AdapterRouter",
        "request_routing_stats_period_s": 0.5,
    }
    return serve.deployment(
        EngineDeployment,
        name=name,
        **replica_options(settings.serve),
        request_router_config=routing,
        ray_actor_options=engine_options(settings),
        **_options(settings),
    )


def _options(settings: Settings) -> dict[str, Any]:
    return {
        # Above the bounds of the engines, which refuse first.
        "max_ongoing_requests": 4096,
        "health_check_period_s": 2,
        "graceful_shutdown_timeout_s": settings.serve.drain_seconds + 10,
        # Period at which a stopping replica looks whether it still has requests; Serve's default is 2 s.
        "graceful_shutdown_wait_loop_s": 0.1,
        "logging_config": {"enable_access_log": False},
    }


def replica_options(settings: ServeSettings) -> dict[str, Any]:
    """The number of replicas: constant, or decided by `loramill.serve.autoscaling.policy`."""
    if settings.min_replicas >= settings.max_replicas:
        return {"num_replicas": settings.min_replicas}
    targets = ("pending_seconds", "first_token_seconds", "down_seconds", "idle_seconds")
    policy = {
        "policy_function": "loramill.serve.autoscaling.ray_policy:Policy",
        "policy_kwargs": {name: getattr(settings, name) for name in targets},
    }
    bounds = {"min_replicas": settings.min_replicas, "max_replicas": settings.max_replicas}
    return {"autoscaling_config": {**UNDELAYED, **bounds, "initial_replicas": settings.min_replicas, "policy": policy}}


def with_fixed_device(settings: ServeSettings) -> ServeSettings:
    """The settings of a replica that Ray places, where the device "auto" is the CPU.

    The device must not depend on which nodes are running at the moment, and a replica must not use a GPU that Ray has
    not assigned: without an assignment it sees all GPUs of its node, including those of jobs.
    """
    return settings.model_copy(update={"device": "cpu"}) if settings.device == "auto" else settings


def engine_options(settings: Settings) -> dict[str, Any]:
    """Ray options of an engine replica: its share of a GPU if the device is cuda, otherwise none."""
    environment = SINGLE_LOOP_ENV | ONLY_ASSIGNED_GPUS | one_thread_env(settings.serve.threads) | metrics_env(settings)
    options: dict[str, Any] = {"num_cpus": 0.1, "num_gpus": 0, "runtime_env": {"env_vars": environment}}
    if settings.serve.device == "cuda":
        options["runtime_env"] = {"env_vars": environment | GPU_ALLOCATOR}
        options["num_gpus"] = ray_share(settings.serve.gpu_fraction or 1.0)
        if settings.serve.accelerator_type is not None:
            options["accelerator_type"] = settings.serve.accelerator_type
    return options


def metrics_env(settings: Settings) -> dict[str, str]:
    """Variables that make the processes of one node share their metrics: each gateway exposes those of all."""
    return {"PROMETHEUS_MULTIPROC_DIR": str(settings.home / "run" / "metrics")}


def one_thread_env(threads: int) -> dict[str, str]:
    """Variables that keep OpenMP from spinning on cores that others use (which costs 10x on a busy machine)."""
    return {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}


def deploy(settings: Settings) -> None:
    """Starts or updates the application on the Ray cluster of this process; returns when it answers."""
    if settings.serve.ingress == "direct":
        serve.start(proxy_location="Disabled")
    else:
        serve.start(http_options={"host": settings.serve.host, "port": settings.serve.port})
    serve.run(application(settings), name=APP, route_prefix=None if settings.serve.ingress == "direct" else "/")
