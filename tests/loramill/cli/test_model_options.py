"""Options from the fields of a model."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
import typer
from pydantic import BaseModel, Field
from typer.testing import CliRunner

from loramill.cli.model_options import description_of, option_help, option_type, option_words, replace_keywords


class Fields(BaseModel):
    """One field of each kind."""

    word: Literal["a", "b"] | None = Field(default=None, description="A word.")
    number: int | None = Field(default=None, description="A number.")
    auto: float | Literal["auto"] = Field(default="auto", description="A number, or auto.")
    names: tuple[str, ...] | str | None = Field(default=None, description="Names.")
    pairs: dict[str, int] | None = Field(default=None, description="Pairs.")


@pytest.mark.parametrize(
    ("name", "kind"),
    [("word", Literal["a", "b"]), ("number", int), ("auto", float), ("names", str), ("pairs", str)],
)
def test_an_option_has_the_type_of_the_field_or_is_text(name: str, kind: Any) -> None:
    assert option_type(Fields, name) == kind


def test_help_lists_the_words_of_a_field() -> None:
    assert option_help(Fields, "word") == "A word. Choices: a, b."
    assert option_help(Fields, "number") == "A number."
    assert (option_words(Fields, "word"), option_words(Fields, "names")) == (("a", "b"), ())
    assert description_of(Annotated[int, Field(description="Bits.")]) == "Bits."


def test_keywords_become_options_after_the_other_parameters() -> None:
    def command(fixed: Annotated[str, typer.Option()] = "", **options: Any) -> None:
        typer.echo(f"{fixed} {options}")

    app = typer.Typer()
    app.command()(replace_keywords(command, [("number", Annotated[int | None, typer.Option()])]))
    assert CliRunner().invoke(app, ["--fixed", "x", "--number", "3"]).stdout == "x {'number': 3}\n"
    assert CliRunner().invoke(app, []).stdout == " {'number': None}\n"
