"""Plans the memory of a job from its options and the base's config.json: no weights, data or gateway are needed."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from loramill.errors import InvalidRequest, NotEnoughMemory, SettingsInvalid
from loramill.gpus import MIN_CAPABILITY
from loramill.local.machine import free_memory
from loramill.models.catalog import EXPERT_ARCHITECTURES, Base
from loramill.names import AdapterName
from loramill.settings import Settings
from loramill.sizing import ADJUSTABLE, GpuPool, SizingPlan, SizingRequest, anatomy, find_config, refuse_experts
from loramill.sizing import plan as choose_plan
from loramill.sizing.anatomy import Anatomy
from loramill.sizing.devices import gpu_bytes, memory_bytes
from loramill.sizing.planner import plan_as_is
from loramill.sizing.serving import planned_limits
from loramill.sizing.session_plan import SessionPlan, plan_session
from loramill.submission.defaults import BATCH_SIZE, resolve_spec
from loramill.submission.plan_options import PlanOptions
from loramill.submission.request import Hyperparameters, JobRequest, LoramillOptions
from loramill.types import GpuInfo, JobSpec, Quantization

#: The defaults of a job depend on its number of examples; a plan has no file to count.
_EXAMPLES = 1000


@dataclass(frozen=True, slots=True)
class JobPlan:
    """The plan of a job.

    Attributes:
        sizing: the memory, and the options that were chosen.
        device_known: whether the size of the device is known. If not, no options were chosen.
        engine: the limits of an engine on such a GPU, or why there can be none, as a sentence; None without a GPU.
        session: the plan of several such jobs in one session, of which `sizing` is one; None: one job is planned.
    """

    sizing: SizingPlan
    device_known: bool
    engine: str | None = None
    session: SessionPlan | None = None


def plan_job(options: Mapping[str, Any], settings: Settings) -> JobPlan:
    """Plans the memory of a job, and chooses the options that make it fit.

    Args:
        options: fields of `PlanOptions`; numbers may be text.
        settings: give the base, its quantization and the device that `options` leaves out.

    Raises:
        InvalidRequest: an option is unknown or invalid; `param` names it.
        DoesNotFit: no choice fits; `nearest` lists the nearest jobs that do.
        BaseUnusable: the base does not exist.
    """
    read = read_plan_options(options)
    if read.sweep is not None:
        raise InvalidRequest(
            "A plan is of one training: leave 'sweep' out, and set 'tenants' to the number of candidates.",
            param="sweep",
        )
    pool = _gpu_pool(read, settings)
    config = anatomy(find_config(settings.base if read.base is None else read.base, settings.cache))
    spec, quantization = _resolve(read, config, settings)
    request = SizingRequest(
        spec=spec,
        base=config,
        quantization=quantization,
        lengths=(spec.max_example_tokens,),
        pool=pool,
        adjustable=frozenset(ADJUSTABLE) - spec.model_fields_set,
        supervised_fraction=1.0 if read.answers is None else read.answers,
        shared_prefixes=False,
    )
    device_known = pool.device_bytes > 0
    engine = _describe_engine(read, config, quantization, settings)
    if read.tenants is not None:
        session = plan_session(request, read.tenants)
        return JobPlan(session.job, device_known, engine, session)
    sizing = choose_plan(request) if device_known else plan_as_is(request, spec)
    return JobPlan(sizing, device_known, engine)


def read_plan_options(options: Mapping[str, Any]) -> PlanOptions:
    """Checks the names and types of options.

    Raises:
        InvalidRequest: one is unknown or of another type; `param` names it.
    """
    try:
        return PlanOptions.model_validate(options)
    except ValidationError as error:
        problem = error.errors()[0]
        field = str(problem["loc"][0])
        raise InvalidRequest(f"'{field}': {problem['msg']}.", param=field) from error


def read_plan_file(file: Path) -> dict[str, Any]:
    """Reads options from a TOML file, or from a JSON file whose name ends in .json.

    Raises:
        InvalidRequest: the file can't be read or is not a table of fields.
    """
    try:
        text = file.read_text(encoding="utf-8")
        values = json.loads(text) if file.suffix == ".json" else tomllib.loads(text)
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"The spec {file} can't be read: {error}. Give TOML, or JSON in a .json file.") from error
    if not isinstance(values, dict):
        raise InvalidRequest(f"The spec {file} is not a table of fields.")
    return values


def _gpu_pool(options: PlanOptions, settings: Settings) -> GpuPool:
    """Returns the device to plan for; of 0 bytes if its size isn't known."""
    if options.gpu is not None and options.cpu is not None:
        raise InvalidRequest("'gpu' and 'cpu' exclude each other; give one.", param="gpu")
    if options.gpu is not None:
        sharers = settings.jobs.per_gpu if options.per_gpu is None else options.per_gpu
        return GpuPool("cuda", gpu_bytes(options.gpu), sharers)
    if options.cpu is not None:
        return GpuPool("cpu", memory_bytes(options.cpu))
    return GpuPool.from_settings(settings.jobs) or GpuPool("cuda" if settings.jobs.on_gpu else "cpu", 0)


def _describe_engine(options: PlanOptions, base: Anatomy, quantization: Quantization, settings: Settings) -> str | None:
    size = settings.jobs.device_bytes if settings.jobs.on_gpu else None
    size = gpu_bytes(options.gpu) if options.gpu is not None else size
    if size is None or options.cpu is not None or settings.serve.device == "cpu":
        return None
    gpu = GpuInfo(name="the GPU" if options.gpu is None else options.gpu, bytes=size, capability=MIN_CAPABILITY)
    host = free_memory()
    try:
        limits = planned_limits(gpu, base, quantization, settings.serve, 0 if host is None else host.free_bytes)
    except (NotEnoughMemory, SettingsInvalid) as error:
        return f"No engine fits: {error.message}"
    return f"An engine with {settings.serve.gpu_fraction or 1:.0%} of {gpu}: {limits}."


def _resolve(options: PlanOptions, config: Anatomy, settings: Settings) -> tuple[JobSpec, Quantization]:
    """Returns the spec with every default, and the quantization of the base."""
    mixture = config.experts is not None
    own = options.model_dump(include=set(LoramillOptions.model_fields), exclude_none=True)
    if options.length is not None:
        own["max_length"] = options.length
    own.setdefault("quantization", "nf4" if options.method == "qlora" else settings.quantization)
    job = LoramillOptions.model_validate(own)
    request = JobRequest(
        adapter=AdapterName("plan", "plan"),
        train="plan",
        hyperparameters=Hyperparameters(batch_size=BATCH_SIZE if options.batch_size is None else options.batch_size),
        options=job,
    )
    quantization = job.quantization or "none"
    if mixture and quantization != "none":
        raise InvalidRequest(
            "The base is a mixture of experts, and experts can't be quantized: leave 'quantization' out, use another "
            "method than qlora, and leave the setting `quantization` out.",
            param="quantization",
        )
    architecture = EXPERT_ARCHITECTURES[0] if mixture else "plan"
    base = Base("plan", Path(), "0" * 64, architecture, config.context, quantization)
    spec = resolve_spec(request, base, examples=_EXAMPLES)
    if mixture:
        refuse_experts(spec)
    return spec, quantization
