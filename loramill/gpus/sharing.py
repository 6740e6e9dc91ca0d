"""How the engines and the training sessions of one machine share its GPUs: pure decisions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from loramill.errors import SettingsInvalid, SetupError
from loramill.gpus import FP8_ON_CPU, fp8_problem, ray_share
from loramill.gpus.machine import Gpu, gpu_problem
from loramill.plural import counted
from loramill.settings import Settings

#: Share of a GPU for engines where training needs the same GPU.
_SHARED = 0.5


@dataclass(frozen=True, slots=True)
class DeviceDecision:
    """The settings with all devices decided, and the decision in a sentence; None if there was nothing to decide."""

    settings: Settings
    explanation: str | None


@dataclass(frozen=True, slots=True)
class _Shares:
    """Shares of one GPU: of an engine replica (0: it runs on the CPU), and of the jobs on a GPU together."""

    engine: float
    jobs: float


def decide_devices(settings: Settings, gpus: Sequence[Gpu], cuda: str | None, *, native: bool = True) -> DeviceDecision:
    """Decides on which device of this machine engines and training sessions run, and which share of a GPU each takes.

    Args:
        settings: what they set is kept.
        gpus: the machine's.
        cuda: the CUDA version that torch was built for; None: a build without CUDA.
        native: whether the base runs by loramill's own decoder; other bases are served on the CPU.

    Raises:
        SetupError: the settings require a GPU, or one that computes in float8, and there is none that can be used.
        SettingsInvalid: the settings require that jobs train on GPUs, and engines leave no room for them.
    """
    decision = _decide(settings, gpus, cuda, native)
    if settings.serve.quantization == "fp8":
        if decision.settings.serve.device != "cuda":
            raise SetupError(FP8_ON_CPU)
        if problem := next(filter(None, (fp8_problem(gpu.name, gpu.capability) for gpu in gpus)), None):
            raise SetupError(problem)
    return decision


def _decide(settings: Settings, gpus: Sequence[Gpu], cuda: str | None, native: bool) -> DeviceDecision:
    required = settings.serve.device == "cuda" or settings.jobs.on_gpu
    problem = next(filter(None, (gpu_problem(gpu, cuda) for gpu in gpus)), None)
    if problem and len(gpus) > 1:
        problem += " If the machine has others, CUDA_VISIBLE_DEVICES can hide it."
    if not gpus or problem:
        if required:
            none = "The settings require a GPU (serve.device, jobs.use_gpu), and there is none on this machine."
            raise SetupError(problem or none)
        return DeviceDecision(_on_cpu(settings), problem and f"Everything runs on the CPU. {problem}")
    serving = settings.serve.device == "cuda" or (settings.serve.device == "auto" and native)
    training = settings.jobs.use_gpu is not False
    if not serving and not training:
        return DeviceDecision(_on_cpu(settings), None)
    shares = _choose_shares(settings, len(gpus), serving=serving, training=training)
    sessions = session_capacity(settings, len(gpus), shares.engine, shares.jobs) if training else 0
    if training and not sessions:
        if settings.jobs.on_gpu:
            raise SettingsInvalid(
                "Jobs are to train on GPUs (jobs.use_gpu), and the engines leave no room for a session: lower "
                "serve.gpu_fraction or serve.max_replicas, or raise jobs.per_gpu."
            )
        training, shares = False, _choose_shares(settings, len(gpus), serving=serving, training=False)
    decided = _with_shares(settings, shares, gpus, serving=serving, sessions=sessions if training else None)
    return DeviceDecision(decided, _explain(decided, gpus))


def session_capacity(settings: Settings, gpus: int, engine: float, jobs: float) -> int:
    """The number of sessions that GPUs hold besides all engine replicas.

    Args:
        settings: give the number of replicas, and of jobs per GPU.
        gpus: number of GPUs.
        engine: share of one GPU that a replica takes.
        jobs: share of one GPU that jobs take together.
    """
    session = settings.jobs.model_copy(update={"gpu_fraction": jobs}).gpu_share
    replicas = _replicas(settings) if engine else 0
    occupied = min(gpus, replicas)
    left = 1 - engine * math.ceil(replicas / gpus)
    return occupied * _count(left, session) + (gpus - occupied) * _count(1, session)


def _choose_shares(settings: Settings, gpus: int, *, serving: bool, training: bool) -> _Shares:
    """A whole GPU for each replica and each group of jobs if there are enough GPUs; otherwise they share each GPU."""
    replicas = _replicas(settings) if serving else 0
    per_gpu = max(1, math.ceil(replicas / gpus))
    shared = replicas >= gpus
    default = ray_share(_SHARED / per_gpu) if training and shared else 1.0
    engine = (settings.serve.gpu_fraction or default) if serving else 0.0
    left = round(1 - engine * per_gpu, 4)
    return _Shares(engine, settings.jobs.gpu_fraction or (left if shared and left > 0 else 1.0))


def _with_shares(
    settings: Settings, shares: _Shares, gpus: Sequence[Gpu], *, serving: bool, sessions: int | None
) -> Settings:
    serve = {"device": "cuda", "gpu_fraction": shares.engine} if serving else {"device": "cpu"}
    jobs: dict[str, object] = {"use_gpu": False}
    if sessions is not None:
        jobs = {
            "use_gpu": True,
            "gpu_fraction": shares.jobs,
            "sessions": min(settings.jobs.sessions, sessions),
            "device_bytes": settings.jobs.device_bytes or min(gpu.bytes for gpu in gpus),
        }
    update = {
        "serve": settings.serve.model_copy(update=serve),
        "jobs": settings.jobs.model_copy(update=jobs),
    }
    return settings.model_copy(update=update)


def _on_cpu(settings: Settings) -> Settings:
    update = {
        "serve": settings.serve.model_copy(update={"device": "cpu"}),
        "jobs": settings.jobs.model_copy(update={"use_gpu": False}),
    }
    return settings.model_copy(update=update)


def _explain(settings: Settings, gpus: Sequence[Gpu]) -> str:
    serve, jobs = settings.serve, settings.jobs
    names = ", ".join(map(str, gpus))
    on_gpu = serve.device == "cuda"
    engine = f"an engine takes {serve.gpu_fraction:.0%} of a GPU" if on_gpu else "engines run on the CPU"
    if not jobs.on_gpu:
        return f"{names}: {engine}, and jobs train on the CPU."
    sessions = counted(jobs.sessions, "training session")
    return f"{names}: {engine}, and up to {sessions} {jobs.gpu_share:.0%}{' each' if jobs.sessions > 1 else ''}."


def _replicas(settings: Settings) -> int:
    """The number of engine replicas of all bases."""
    return max(1, settings.serve.max_replicas) * (1 + len(settings.serve.bases))


def _count(room: float, share: float) -> int:
    return max(0, math.floor(room / share + 1e-6))
