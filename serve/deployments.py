"""Ray Serve around the gateway and the engine replica: who runs where, and nothing else."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle

from loramill.bases import find_base
from loramill.chat import ChatTokenizer
from loramill.errors import LoramillError, Overloaded, Unavailable
from loramill.registry import Registry
from loramill.serve.api.app import build_api
from loramill.serve.protocol import TextChunk, TextRequest
from loramill.settings import ServeSettings, Settings

log = logging.getLogger(__name__)

APP = "loramill"
ENGINE = "engine"


class EngineDeployment:
    """An engine replica as a Serve deployment."""

    def __init__(self, settings: Settings) -> None:
        from loramill.serve.replica import Replica  # torch, which the gateway and the driver can do without

        registry = Registry.open(settings.database, settings.artifacts)
        base = find_base(settings.base, settings.cache, settings.quantization)
        self._replica = Replica(base, registry.artifacts.fetch, settings.serve)

    async def generate(self, request: TextRequest) -> AsyncGenerator[TextChunk, None]:
        """Streams one answer."""
        async for chunk in self._replica.generate(request):
            yield chunk

    async def check_health(self) -> None:
        """Tells Serve to replace a replica whose engine has stopped."""
        await self._replica.ready()


class HandleBackend:
    """The engine replicas behind a Serve handle, as the gateway's `Backend`."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def generate(self, request: TextRequest) -> AsyncGenerator[TextChunk, None]:
        """Streams one answer; closing the iterator cancels it on the replica."""
        stream = self._handle.options(stream=True).generate.remote(request)
        try:
            async for chunk in stream:
                yield chunk
        except BackPressureError as error:
            raise Overloaded("Every engine replica is at its limit; try again in a moment.") from error
        except RayTaskError as error:
            if isinstance(error.cause, LoramillError):
                raise error.cause from error
            raise
        except RayActorError as error:
            raise Unavailable("The engine replica was lost while it answered; ask again.") from error
        finally:
            stream.cancel()

    async def ready(self) -> None:
        """Raises Unavailable until an engine replica answers."""
        try:
            await self._handle.check_health.remote()
        except (RayTaskError, RayActorError) as error:
            raise Unavailable("No engine replica is up yet; try again in a moment.") from error


class GatewayDeployment:
    """A gateway replica; what it does is in the app that `gateway_builder` makes there."""

    def __init__(self, engine: DeploymentHandle) -> None:
        self._engine = engine


def gateway_builder(settings: Settings) -> Callable[[], FastAPI]:
    """Returns what a gateway replica calls to build its app; nothing of the app itself is shipped."""

    def build() -> FastAPI:
        base = find_base(settings.base, settings.cache, settings.quantization)
        return build_api(
            registry=Registry.open(settings.database, settings.artifacts),
            base=base,
            tokenizer=ChatTokenizer.load(base.folder),
            backend=HandleBackend(serve.get_deployment_handle(ENGINE, APP)),
            settings=settings,
        )

    return build


def application(settings: Settings) -> Any:
    """The Serve application: one gateway in front of one engine replica."""

    gateway = serve.deployment(
        serve.ingress(gateway_builder(settings))(GatewayDeployment),
        name="gateway",
        max_ongoing_requests=1024,
        ray_actor_options={"num_cpus": 0.1},
    )
    engine = serve.deployment(
        EngineDeployment,
        name=ENGINE,
        max_ongoing_requests=1024,
        health_check_period_s=2,
        graceful_shutdown_timeout_s=30,
        ray_actor_options=engine_options(settings.serve),
    )
    return gateway.bind(engine.bind(settings.model_copy(update={"serve": on_ray(settings.serve)})))


def on_ray(settings: ServeSettings) -> ServeSettings:
    """The settings of a replica that Ray places: there, "auto" is the CPU.

    Where it runs must not hang on which nodes are up just now; nor may it take a GPU that Ray knows nothing of: a
    replica that asks for none sees all of its node's, those of jobs included.
    """
    return settings.model_copy(update={"device": "cpu"}) if settings.device == "auto" else settings


def engine_options(settings: ServeSettings) -> dict[str, Any]:
    """What Ray is asked for on behalf of the engine replica: a whole GPU if the settings say cuda, and else none."""
    gpus = 1 if settings.device == "cuda" else 0
    environment = {"env_vars": one_thread_env(settings.threads)}
    return {"num_cpus": 0.1, "num_gpus": gpus, "runtime_env": environment}


def one_thread_env(threads: int) -> dict[str, str]:
    """Variables that keep OpenMP from spinning on cores that others use (it costs 10x on a busy machine)."""
    return {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}


def deploy(settings: Settings) -> None:
    """Starts or updates the application on the Ray cluster this process is connected to; returns when it answers."""
    gpus = ray.cluster_resources().get("GPU", 0)
    if gpus and settings.serve.device == "auto":
        log.warning("the engine runs on a CPU of a cluster with %d GPUs: set serve.device to cuda or cpu", gpus)
    serve.start(http_options={"host": settings.serve.host, "port": settings.serve.port})
    serve.run(application(settings), name=APP, route_prefix="/")
