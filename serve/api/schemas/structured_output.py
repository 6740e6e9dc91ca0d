"""Structured output: JSON, tools, and which tools must be called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from loramill.data.conversation import NO_PARAMETERS, template_tool
from loramill.errors import InvalidRequest
from loramill.serve.api.schemas.common import RequestBody
from loramill.serve.protocol import OutputConstraint

FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
JsonSchema = dict[str, Any]


class NamedSchema(RequestBody):
    """A named JSON schema. It is enforced whether `strict` is set or not."""

    name: FunctionName = Field(description="Name of the schema.")
    description: str | None = Field(default=None, description="Accepted for compatibility, and ignored.")
    strict: bool | None = Field(default=None, description="Accepted for compatibility: schemas are always enforced.")
    json_schema: JsonSchema | None = Field(default=None, alias="schema", description="The JSON schema.")


class JsonObjectFormat(RequestBody):
    """The answer must be a JSON object."""

    type: Literal["json_object"] = Field(description="Type of the format.")


class JsonSchemaFormat(RequestBody):
    """The answer must match a JSON schema."""

    type: Literal["json_schema"] = Field(description="Type of the format.")
    json_schema: NamedSchema = Field(description="The schema. Without one, any object matches.")


ResponseFormat = Annotated[JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class Function(RequestBody):
    """A function that the model may call."""

    name: FunctionName = Field(description="Name of the function.")
    description: str | None = Field(default=None, description="What the function does, for the model.")
    parameters: JsonSchema | None = Field(default=None, description="JSON schema of the arguments, an object.")
    strict: bool | None = Field(default=None, description="Accepted for compatibility: forced calls are always strict.")


class Tool(RequestBody):
    """A tool that the model may call."""

    type: Literal["function"] = Field(description="Type of the tool.")
    function: Function = Field(description="The function.")

    def to_template(self) -> Mapping[str, Any]:
        """Returns the tool as chat templates expect it."""
        return template_tool(self.function.model_dump())

    @property
    def arguments_schema(self) -> JsonSchema:
        """JSON schema of the arguments, an object."""
        return {"type": "object", **(self.function.parameters or NO_PARAMETERS)}


class ToolChoiceFunction(RequestBody):
    """The function that must be called."""

    name: FunctionName = Field(description="Name of the function.")


class NamedToolChoice(RequestBody):
    """The tool that must be called."""

    type: Literal["function"] = Field(description="Type of the tool.")
    function: ToolChoiceFunction = Field(description="The function.")


class StructuredOutputParams(RequestBody):
    """Parameters of a chat request that constrain the answer."""

    no_op_values: ClassVar[Mapping[str, Sequence[Any]]] = {"response_format": ({"type": "text"},), "tools": ([],)}
    response_format: ResponseFormat | None = Field(default=None, description="Format of the answer.")
    tools: list[Tool] = Field(default=[], max_length=128, description="Tools that the model may call.")
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice = Field(
        default="auto", description="Whether the model may or must call tools, or the tool that it must call."
    )
    parallel_tool_calls: bool = Field(default=True, description="Allow several tool calls in one answer.")

    @property
    def usable_tools(self) -> list[Tool]:
        """Tools that the chat template renders."""
        return [] if self.tool_choice == "none" else self.tools

    def constraint(self) -> OutputConstraint | None:
        """The constraint of the answer; None: no constraint.

        Raises:
            InvalidRequest: two tools have the same name, or a tool that must be called is missing.
        """
        called = self._required_tools()
        if called:
            calls = {tool.function.name: tool.arguments_schema for tool in called}
            return OutputConstraint(
                "tools",
                tool_schemas=calls,
                parallel_tool_calls=self.tool_choice == "required" and self.parallel_tool_calls,
            )
        schema = self._schema()
        if schema is None:
            return None
        # A model with tools may call them instead.
        calls = {tool.function.name: tool.arguments_schema for tool in self.usable_tools}
        return OutputConstraint(
            "response_format", schema, calls, parallel_tool_calls=bool(calls) and self.parallel_tool_calls
        )

    def _required_tools(self) -> list[Tool]:
        """Tools of which one must be called."""
        names = [tool.function.name for tool in self.tools]
        if twice := {name for name in names if names.count(name) > 1}:
            raise InvalidRequest(f"Two tools have the name '{min(twice)}'; names must be unique.", param="tools")
        if isinstance(self.tool_choice, NamedToolChoice):
            name = self.tool_choice.function.name
            if name not in names:
                raise InvalidRequest(f"'tool_choice' is '{name}', which is not in 'tools'.", param="tool_choice")
            return [self.tools[names.index(name)]]
        if self.tool_choice == "required" and not names:
            raise InvalidRequest("'tool_choice' is 'required', but there are no 'tools'.", param="tool_choice")
        return self.tools if self.tool_choice == "required" else []

    def _schema(self) -> JsonSchema | None:
        if isinstance(self.response_format, JsonSchemaFormat):
            schema = self.response_format.json_schema.json_schema
            return {"type": "object"} if schema is None else schema
        return {"type": "object"} if self.response_format is not None else None
