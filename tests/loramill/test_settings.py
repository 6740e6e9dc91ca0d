"""Settings: where their values come from, and their descriptions."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from loramill.errors import SettingsInvalid
from loramill.settings import Settings
from loramill.settings_origin import effective_settings
from loramill.types import JobSpec, Limits


def descriptions(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}", field.description or ""
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from descriptions(field.annotation, f"{prefix}{name}.")


@pytest.mark.parametrize(
    ("name", "description"),
    [*descriptions(Settings), *descriptions(JobSpec, "JobSpec."), *descriptions(Limits, "Limits.")],
)
def test_a_description_is_understood_without_its_name(name: str, description: str) -> None:
    assert re.fullmatch(r"[A-Z][^\n]{9,}[.]", description) or description.startswith("fsspec URL"), name
    # A fragment that needs its label.
    assert not re.match(r"(Of|That|For which|Beyond|Beside|It|They|Its|Their) ", description), name


def test_settings_show_where_they_come_from_and_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("LORAMILL_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loramill.toml").write_text(
        'artifacts_url = "s3://key:hidden@bucket/x?secret_access_key=hidden"\n[serve]\nport = 9000\nthreads = 2\n'
    )
    monkeypatch.setenv("LORAMILL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LORAMILL_SERVE__PORT", "9001")
    monkeypatch.setenv("LORAMILL_JOBS", '{"sessions": 3}')
    monkeypatch.setenv("LORAMILL_DATABASE_URL", "postgresql+psycopg://me:hidden@db.example/mill?sslpassword=hidden")
    monkeypatch.setenv("LORAMILL_API_KEY", "lm-hidden")
    found = {each.name: each for each in effective_settings()}
    file = str(tmp_path / "loramill.toml")
    assert {name: (found[name].value, found[name].origin) for name in ("serve.port", "serve.threads", "base")} == {
        "serve.port": (9001, "LORAMILL_SERVE__PORT"),
        "serve.threads": (2, file),
        "base": ("smollm2-135m", "default"),
    }
    assert (found["jobs.sessions"].value, found["jobs.sessions"].origin) == (3, "LORAMILL_JOBS")
    assert found["database_url"].value == "postgresql+psycopg://me:…@db.example/mill?sslpassword=…"
    assert found["artifacts_url"].value == "s3://key:…@bucket/x?secret_access_key=…"
    assert found["url"].value == "http://127.0.0.1:9001"
    assert "hidden" not in " ".join(str(each.value) for each in found.values())


@pytest.mark.parametrize(("text", "value"), [("true", True), ("0", False), ("auto", "auto")])
def test_use_gpu_is_a_switch_or_auto(monkeypatch: pytest.MonkeyPatch, text: str, value: object) -> None:
    monkeypatch.setenv("LORAMILL_JOBS__USE_GPU", text)
    settings = Settings.load()
    assert settings.jobs.use_gpu == value and settings.jobs.on_gpu is (value is True)
    assert Settings.model_validate(settings.model_dump(mode="json")).jobs == settings.jobs


def test_float8_is_for_a_base_that_is_not_quantized() -> None:
    assert Settings.load(serve={"quantization": "fp8"}).serve.served_quantization("none") == "fp8"
    assert Settings.load(quantization="nf4").serve.served_quantization("nf4") == "nf4"
    with pytest.raises(SettingsInvalid, match=r'serve\.quantization = "fp8" is for .* quantization is "int8"'):
        Settings.load(quantization="int8", serve={"quantization": "fp8"})


def test_a_number_of_few_choices_can_be_set_by_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAMILL_SERVE__ADAPTER_BITS", "8")
    assert Settings.load().serve.adapter_bits == 8
    for wrong in ("4", "8.5", "eight"):
        monkeypatch.setenv("LORAMILL_SERVE__ADAPTER_BITS", wrong)
        with pytest.raises(SettingsInvalid, match=r"'serve.adapter_bits': Input should be 16 or 8"):
            Settings.load()
