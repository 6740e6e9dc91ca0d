"""One source for job options: names, types and descriptions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest

from loramill.cli.fine_tuning.job_options import PANELS, job_option_help
from loramill.errors import InvalidRequest
from loramill.submission.options import JobOptions, JobOptionsDict, from_text, read_options
from loramill.submission.request import LoramillOptions
from loramill.types import JobSpec


def kinds(annotation: Any) -> set[Any]:
    """The members of a union: plain types, literals, and containers regardless of their mutability."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return set().union(*map(kinds, arguments))
    if origin is Annotated:
        return kinds(arguments[0])
    if origin is Literal:
        return set(arguments)
    if origin in (dict, Mapping):
        return {("mapping", *arguments)}
    if origin in (tuple, Sequence):
        return {("sequence", arguments[0])}
    return {annotation}


@pytest.mark.parametrize("name", JobOptions.model_fields)
def test_the_keywords_of_submit_are_the_fields_of_the_model(name: str) -> None:
    field = kinds(JobOptions.model_fields[name].annotation) | {NoneType}
    assert kinds(get_type_hints(JobOptionsDict)[name]) == field


def test_each_field_has_a_keyword_and_an_option_of_the_command_line() -> None:
    names = set(JobOptions.model_fields)
    assert set(JobOptionsDict.__annotations__) == names
    assert sorted(name for panel in PANELS.values() for name in panel) == sorted(names)


@pytest.mark.parametrize("name", sorted(JobOptions.model_fields.keys() & JobSpec.model_fields.keys()))
def test_an_option_has_the_type_of_its_spec_field(name: str) -> None:
    if name == "train_on":  # the spec has further values, for older jobs
        return
    spec, option = (kinds(model.model_fields[name].annotation) for model in (JobSpec, JobOptions))
    assert spec - {NoneType} <= option


@pytest.mark.parametrize("name", JobOptions.model_fields)
def test_each_field_has_a_description_that_ends_as_a_sentence(name: str) -> None:
    description = JobOptions.model_fields[name].description or ""
    assert description[:1].isupper() or name == "loraplus_lr_ratio"
    assert description.endswith(".") and description in job_option_help(name)
    if name in LoramillOptions.model_fields:
        assert LoramillOptions.model_fields[name].description == description


@pytest.mark.parametrize(
    ("name", "ending"),
    [
        ("rank", "Default: 16."),
        ("alpha", "Default: 2 x rank."),
        ("packing", "Default: yes."),
        ("dropout", "Default: 0.0."),
        ("method", "Default: lora. Choices: lora, dora, adalora, pissa, loftq, full, rslora, qlora, lora+."),
        ("gradient_checkpointing", "Choices: yes, no."),
    ],
)
def test_help_ends_with_the_default_and_the_choices(name: str, ending: str) -> None:
    assert job_option_help(name).endswith(ending)


def test_an_unknown_option_and_a_wrong_type_are_named() -> None:
    with pytest.raises(InvalidRequest) as refused:
        read_options({"ranks": 4, "alpha": "much"})
    first, second = sorted(refused.value.message.split("\n"))
    assert first.startswith("alpha: ") and second == "there is no option 'ranks'; did you mean 'rank'?"


def test_text_is_parsed_into_lists_and_pairs() -> None:
    assert from_text("targets", "q_proj, v_proj") == ["q_proj", "v_proj"]
    assert from_text("rank_pattern", "q_proj=4,v_proj=8") == {"q_proj": "4", "v_proj": "8"}
    assert from_text("columns", "auto") == "auto" and from_text("rank", "4") == "4"
    with pytest.raises(InvalidRequest, match="NAME=VALUE"):
        from_text("metadata", "team")
