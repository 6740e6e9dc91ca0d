"""Ray Serve around the gateway and the engine replicas: who runs where, and nothing else."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve

from loramill import logs
from loramill.data.tokenizer import ChatTokenizer
from loramill.gpus import ONLY_ASSIGNED_GPUS
from loramill.models.catalog import find_base
from loramill.registry import Registry
from loramill.serve.api.app import build_api
from loramill.serve.api.dependencies import ServedBase
from loramill.serve.api.middleware import access_log
from loramill.serve.autoscaling.ray_policy import UNDELAYED
from loramill.serve.replica.engine_deployment import EngineDeployment
from loramill.serve.transport.channel import Receiver
from loramill.serve.transport.handle import HandleBackend
from loramill.serve.transport.http_server import HttpServer
from loramill.settings import ServeSettings, Settings

log = logging.getLogger(__name__)

APP = "loramill"
ENGINE = "engine"

#: A port of its own is where it is looked for: on the machine that deployed it.
HEAD_NODE_RESOURCE = {"node:__internal_head__": 0.001}

#: Our code blocks no event loop, so that Serve needs none of its own beside it: each call saves some milliseconds.
SINGLE_LOOP_ENV = {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0", "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0"}


class GatewayDeployment:
    """A gateway replica behind Serve's proxy; what it does is in the app that `gateway_builder` makes there."""

    def __init__(self, *engines: Any) -> None:
        self._engines = engines  # Serve starts what a deployment is bound to before it


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
        """Tells Serve to replace a gateway that doesn't listen."""
        self._listener.check()

    async def __del__(self) -> None:
        """Serve's word for the end: no more connections, and what is under way goes on to its end."""
        await self._listener.drain()


def gateway_builder(settings: Settings) -> Callable[[], FastAPI]:
    """Returns what a gateway replica calls to build its app; nothing of the app itself is shipped."""

    def build() -> FastAPI:
        logs.configure()
        access_log.open_access_log(settings.home / "logs")
        receiver = Receiver()
        first, *others = (_served(name, each, receiver) for name, each in engine_settings(settings).items())
        tokenizer = ChatTokenizer.load(first.base.folder)
        for limit in tokenizer.limitations:
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
        gc.freeze()  # as in an engine replica: looking for garbage stops all streams
        return app

    return build


def _served(deployment: str, settings: Settings, receiver: Receiver) -> ServedBase:
    backend = HandleBackend(
        serve.get_deployment_handle(deployment, APP),
        receiver,
        start_seconds=settings.serve.start_seconds,
        scales_to_zero=settings.serve.min_replicas == 0,
    )
    return ServedBase(find_base(settings.base, settings.cache, settings.quantization), backend)


def engine_settings(settings: Settings) -> dict[str, Settings]:
    """The engine deployments by name, one for each base that is served, and the settings of each."""
    others = settings.serve.bases
    return {ENGINE: settings} | {f"{ENGINE}-{Path(base).name}": _additional_base(settings, base) for base in others}


def _additional_base(settings: Settings, base: str) -> Settings:
    """The settings of a further base: it sleeps until it is asked."""
    return settings.model_copy(update={"base": base, "serve": settings.serve.model_copy(update={"min_replicas": 0})})


def application(settings: Settings) -> Any:
    """The Serve application: gateways in front of the engine replicas of each base."""
    behind = [_engine_deployment(name, each).bind(each) for name, each in engine_settings(_on_ray(settings)).items()]
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
        graceful_shutdown_wait_loop_s=0.1,
        ray_actor_options=engine_options(settings),
        **_options(settings),
    )


def _options(settings: Settings) -> dict[str, Any]:
    return {
        # The engines' own bounds refuse first.
        "max_ongoing_requests": 4096,
        "health_check_period_s": 2,
        "graceful_shutdown_timeout_s": settings.serve.drain_seconds + 10,
        "logging_config": {"enable_access_log": False},
    }


def replica_options(settings: ServeSettings) -> dict[str, Any]:
    """How many replicas Serve runs: always as many, or as `loramill.serve.autoscaling.policy` decides."""
    if settings.min_replicas >= settings.max_replicas:
        return {"num_replicas": settings.min_replicas}
    targets = ("pending_seconds", "first_token_seconds", "down_seconds", "idle_seconds")
    policy = {
        "policy_function": "loramill.serve.autoscaling.ray_policy:Policy",
        "policy_kwargs": {name: getattr(settings, name) for name in targets},
    }
    bounds = {"min_replicas": settings.min_replicas, "max_replicas": settings.max_replicas}
    return {"autoscaling_config": {**UNDELAYED, **bounds, "initial_replicas": settings.min_replicas, "policy": policy}}


def _on_ray(settings: Settings) -> Settings:
    return settings.model_copy(update={"serve": with_fixed_device(settings.serve)})


def with_fixed_device(settings: ServeSettings) -> ServeSettings:
    """The settings of a replica that Ray places: there, "auto" is the CPU.

    Where it runs must not hang on which nodes are up just now; nor may it take a GPU that Ray knows nothing of: a
    replica that asks for none sees all of its node's, those of jobs included.
    """
    return settings.model_copy(update={"device": "cpu"}) if settings.device == "auto" else settings


def engine_options(settings: Settings) -> dict[str, Any]:
    """What Ray is asked for on behalf of an engine replica: a whole GPU if the settings say cuda, and else none."""
    gpus = 1 if settings.serve.device == "cuda" else 0
    threads = one_thread_env(settings.serve.threads)
    environment = SINGLE_LOOP_ENV | ONLY_ASSIGNED_GPUS | threads | metrics_env(settings)
    return {"num_cpus": 0.1, "num_gpus": gpus, "runtime_env": {"env_vars": environment}}


def metrics_env(settings: Settings) -> dict[str, str]:
    """Where the processes of one node count together, so that any of its gateways tells the numbers of all."""
    return {"PROMETHEUS_MULTIPROC_DIR": str(settings.home / "run" / "metrics")}


def one_thread_env(threads: int) -> dict[str, str]:
    """Variables that keep OpenMP from spinning on cores that others use (it costs 10x on a busy machine)."""
    return {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}


def deploy(settings: Settings) -> None:
    """Starts or updates the application on the Ray cluster this process is connected to; returns when it answers."""
    gpus = ray.cluster_resources().get("GPU", 0)
    if gpus and settings.serve.device == "auto":
        log.warning("the engine runs on a CPU of a cluster with %d GPUs: set serve.device to cuda or cpu", gpus)
    if settings.serve.ingress == "direct":
        serve.start(proxy_location="Disabled")
    else:
        serve.start(http_options={"host": settings.serve.host, "port": settings.serve.port})
    serve.run(application(settings), name=APP, route_prefix=None if settings.serve.ingress == "direct" else "/")
