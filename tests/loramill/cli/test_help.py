"""Help texts have one source: the description of the model's field, which the API shows too."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel
from typer.main import get_command

from loramill.cli import app
from loramill.cli.model_options import description_of
from loramill.jobs.train.export.merge import MAX_KL
from loramill.serve.api.schemas.generation import GenerationRequest
from loramill.serve.api.schemas.tenants import FairShareRequest, LimitsRequest
from loramill.settings import JobSettings, ServeSettings, Settings
from loramill.submission.plan_options import PlanOptions
from loramill.types import TenantRecord
from loramill.types.sampling import MaxTokens, Temperature, TopP


def option(path: str, name: str) -> Any:
    """An option of a command, such as `tenant share`."""
    command: Any = get_command(app)
    for word in path.split():
        command = command.commands[word]
    return next(each for each in command.params if f"--{name}" in each.opts)


@pytest.mark.parametrize(
    ("path", "name", "model", "field"),
    [
        ("tenant share", "weight", TenantRecord, "weight"),
        ("tenant share", "max-running", TenantRecord, "max_running"),
        ("tenant share", "max-queued", TenantRecord, "max_queued"),
        ("tenant limits", "requests", TenantRecord, "requests_per_minute"),
        ("tenant limits", "tokens", TenantRecord, "tokens_per_minute"),
        ("tenant limits", "concurrent", TenantRecord, "concurrent_requests"),
        ("tenant limits", "stored", TenantRecord, "stored_bytes"),
        ("up", "port", ServeSettings, "port"),
        ("up", "host", ServeSettings, "host"),
        ("up", "base", Settings, "base"),
        ("up", "sessions", JobSettings, "sessions"),
        ("compare", "base", Settings, "base"),
        ("plan", "length", PlanOptions, "max_length"),
        ("plan", "per-gpu", JobSettings, "per_gpu"),
    ],
)
def test_help_is_the_description_of_the_field(path: str, name: str, model: type[BaseModel], field: str) -> None:
    description = (model.model_fields[field].description or "").removesuffix(".")
    assert description and option(path, name).help.startswith(description)


@pytest.mark.parametrize("request_model", [FairShareRequest, LimitsRequest])
def test_the_api_describes_limits_in_the_same_words(request_model: type[BaseModel]) -> None:
    for name, field in request_model.model_fields.items():
        description = (TenantRecord.model_fields[name].description or "").removesuffix(".")
        assert (field.description or "").startswith(description)


@pytest.mark.parametrize(("name", "kind"), [("max_tokens", MaxTokens), ("temperature", Temperature), ("top_p", TopP)])
def test_sampling_options_are_described_once(name: str, kind: Any) -> None:
    texts = {option(path, name.replace("_", "-")).help for path in ("chat", "generate")}
    assert texts == {description_of(kind)} == {GenerationRequest.model_fields[name].description}


def test_the_default_bound_of_a_merge_is_shown() -> None:
    assert option("adapters merge", "max-kl").show_default == f"{MAX_KL:g}"
