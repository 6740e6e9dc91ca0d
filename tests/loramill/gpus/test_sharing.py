"""How engines and sessions share the GPUs of a machine."""

from __future__ import annotations

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramill.errors import SettingsInvalid, SetupError
from loramill.gpus.machine import Gpu
from loramill.gpus.sharing import decide_devices, session_capacity
from loramill.settings import Settings

H100 = Gpu(name="NVIDIA H100", bytes=79 << 30, capability=(9, 0), free_bytes=79 << 30, driver="580.82.07")
L4 = H100.model_copy(update={"name": "NVIDIA L4", "bytes": 22 << 30, "capability": (8, 9)})
T4 = H100.model_copy(update={"name": "Tesla T4", "capability": (7, 5)})


def settings(serve: dict[str, object] | None = None, **jobs: object) -> Settings:
    return Settings.model_validate({"serve": serve or {}, "jobs": {"sessions": 8, **jobs}})


def test_without_a_gpu_everything_runs_on_the_cpu() -> None:
    decision = decide_devices(settings(), (), None)
    assert decision.explanation is None
    assert (decision.settings.serve.device, decision.settings.jobs.use_gpu) == ("cpu", False)
    assert decision.settings.jobs.sessions == 8 and decision.settings.jobs.device_bytes is None


def test_one_gpu_serves_and_trains_by_default() -> None:
    decision = decide_devices(settings(), (H100,), "13.0")
    serve, jobs = decision.settings.serve, decision.settings.jobs
    assert (serve.device, serve.gpu_fraction) == ("cuda", 0.5)
    assert (jobs.use_gpu, jobs.gpu_share, jobs.sessions, jobs.device_bytes) == (True, 0.5, 1, 79 << 30)
    assert decision.explanation == (
        "NVIDIA H100 (79 GiB): an engine takes 50% of a GPU, and up to 1 training session 50%."
    )


@pytest.mark.parametrize(
    ("gpus", "serve", "jobs", "engine", "session", "sessions"),
    [
        (1, {}, {"per_gpu": 2}, 0.5, 0.25, 2),
        (1, {"gpu_fraction": 0.25}, {"per_gpu": 3}, 0.25, 0.25, 3),
        (1, {}, {"sessions": 1, "per_gpu": 4}, 0.5, 0.125, 1),
        (2, {}, {}, 1.0, 1.0, 1),
        (4, {}, {"per_gpu": 3}, 1.0, 0.3333, 8),
        (4, {"max_replicas": 4}, {}, 0.5, 0.5, 4),
        (4, {"max_replicas": 2}, {}, 1.0, 1.0, 2),
        (1, {"max_replicas": 2}, {}, 0.25, 0.5, 1),
        (1, {"bases": ("other",)}, {}, 0.25, 0.5, 1),
        (2, {"gpu_fraction": 0.3}, {}, 0.3, 1.0, 1),
        (2, {"gpu_fraction": 0.3}, {"gpu_fraction": 0.7}, 0.3, 0.7, 2),
        (1, {"device": "cpu"}, {}, None, 1.0, 1),
    ],
)
def test_the_shares_of_engines_and_sessions(
    gpus: int,
    serve: dict[str, object],
    jobs: dict[str, object],
    engine: float | None,
    session: float,
    sessions: int,
) -> None:
    decided = decide_devices(settings(serve, **jobs), (H100,) * gpus, "13.0").settings
    assert decided.serve.gpu_fraction == engine
    assert (decided.jobs.gpu_share, decided.jobs.sessions) == (session, sessions)


@hypothesis.settings(max_examples=60)
@given(
    gpus=st.integers(1, 8),
    fraction=st.none() | st.floats(0.05, 1.0),
    per_gpu=st.integers(1, 16),
    replicas=st.integers(1, 12),
    bases=st.integers(0, 2),
)
def test_engines_and_sessions_never_take_more_than_there_is(
    gpus: int, fraction: float | None, per_gpu: int, replicas: int, bases: int
) -> None:
    serve = {"gpu_fraction": fraction, "max_replicas": replicas, "bases": tuple(map(str, range(bases)))}
    chosen = settings(serve, sessions=100, per_gpu=per_gpu)
    decided = decide_devices(chosen, (H100,) * gpus, "13.0").settings
    engine, session = decided.serve.gpu_fraction, decided.jobs.gpu_share
    assert engine is not None
    if fraction is None:
        assert decided.jobs.on_gpu, "by default there is room for training on every GPU machine"
    if not decided.jobs.on_gpu:
        return
    count = decided.jobs.sessions
    assert 1 <= count == min(100, session_capacity(decided, gpus, engine, decided.jobs.gpu_fraction or 1.0))
    # Each GPU gets its part of the replicas, and then as many sessions as fit.
    total = replicas * (1 + bases)
    placed = 0
    for index in range(gpus):
        on_this_gpu = total // gpus + (index < total % gpus)
        placed += max(0, int((1 - on_this_gpu * engine) / session + 1e-6))
    assert placed >= count


def test_engines_on_a_whole_gpu_leave_training_to_the_cpu() -> None:
    decision = decide_devices(settings({"gpu_fraction": 1.0}), (H100,), "13.0")
    assert (decision.settings.serve.gpu_fraction, decision.settings.jobs.use_gpu) == (1.0, False)
    assert decision.explanation and "jobs train on the CPU" in decision.explanation
    with pytest.raises(SettingsInvalid, match=r"serve\.gpu_fraction"):
        decide_devices(settings({"gpu_fraction": 1.0}, use_gpu=True), (H100,), "13.0")


def test_settings_of_a_cpu_are_kept_on_a_machine_with_a_gpu() -> None:
    decision = decide_devices(settings({"device": "cpu"}, use_gpu=False), (H100,), "13.0")
    assert (decision.settings.serve.device, decision.settings.jobs.on_gpu) == ("cpu", False)
    decision = decide_devices(settings(use_gpu=False), (H100,), "13.0")
    assert (decision.settings.serve.device, decision.settings.serve.gpu_fraction) == ("cuda", 1.0)


def test_a_base_that_only_transformers_runs_is_served_on_the_cpu() -> None:
    decided = decide_devices(settings(), (H100,), "13.0", native=False).settings
    assert (decided.serve.device, decided.jobs.on_gpu, decided.jobs.gpu_share) == ("cpu", True, 1.0)
    assert decide_devices(settings({"device": "cuda"}), (H100,), "13.0", native=False).settings.serve.device == "cuda"


def test_jobs_are_sized_for_the_smallest_gpu() -> None:
    assert decide_devices(settings(), (H100, L4), "13.0").settings.jobs.device_bytes == 22 << 30
    assert decide_devices(settings(device_bytes=2**33), (H100, L4), "13.0").settings.jobs.device_bytes == 2**33


@pytest.mark.parametrize(("gpus", "cuda", "reason"), [((T4,), "13.0", "7.5"), ((H100,), None, "without CUDA")])
def test_a_gpu_that_cannot_be_used_is_refused_or_left_alone(
    gpus: tuple[Gpu, ...], cuda: str | None, reason: str
) -> None:
    decision = decide_devices(settings(), gpus, cuda)
    assert (decision.settings.serve.device, decision.settings.jobs.use_gpu) == ("cpu", False)
    assert decision.explanation and reason in decision.explanation
    for required in (settings({"device": "cuda"}), settings(use_gpu=True)):
        with pytest.raises(SetupError, match=reason):
            decide_devices(required, gpus, cuda)


def test_settings_that_require_a_gpu_are_refused_without_one() -> None:
    for required in (settings({"device": "cuda"}), settings(use_gpu=True)):
        with pytest.raises(SetupError, match="none on this machine"):
            decide_devices(required, (), None)


def test_one_old_gpu_among_others_can_be_hidden() -> None:
    with pytest.raises(SetupError, match="CUDA_VISIBLE_DEVICES"):
        decide_devices(settings({"device": "cuda"}), (H100, T4), "13.0")


@pytest.mark.parametrize("serve", [{}, {"device": "cuda"}])
def test_engines_in_float8_need_gpus_that_have_it(serve: dict[str, object]) -> None:
    fp8 = settings({"quantization": "fp8", **serve})
    for gpu in (L4, H100):
        assert decide_devices(fp8, (gpu,), "13.0").settings.serve.quantization == "fp8"
    a10 = H100.model_copy(update={"name": "NVIDIA A10", "capability": (8, 6)})
    for gpus in ((a10,), (H100, a10)):
        with pytest.raises(SetupError, match=r"NVIDIA A10 has 8\.6"):
            decide_devices(fp8, gpus, "13.0")
    with pytest.raises(SetupError):
        decide_devices(fp8, (), None)
    with pytest.raises(SetupError, match="the engine runs on the CPU"):
        decide_devices(settings({"quantization": "fp8", "device": "cpu"}), (H100,), "13.0")
