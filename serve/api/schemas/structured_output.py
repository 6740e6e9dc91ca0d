"""What a chat request says of its answer's form: JSON, tools, and which of them are to be called."""

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
    """OpenAI's json_schema; it is kept to whether `strict` or not."""

    name: FunctionName
    description: str | None = None
    strict: bool | None = None
    # OpenAI calls it so.
    json_schema: JsonSchema | None = Field(default=None, alias="schema")


class JsonObjectFormat(RequestBody):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchemaFormat(RequestBody):
    """JSON by a schema; without one, any object."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class Function(RequestBody):
    """A function that the model may call; its `strict` holds where a call is forced."""

    name: FunctionName
    description: str | None = None
    parameters: JsonSchema | None = None
    strict: bool | None = None


class Tool(RequestBody):
    """OpenAI's tool, of which there are functions here."""

    type: Literal["function"]
    function: Function

    def to_template(self) -> Mapping[str, Any]:
        """As chat templates know it."""
        return template_tool(self.function.model_dump())

    @property
    def arguments_schema(self) -> JsonSchema:
        """JSON schema of its arguments, which are an object."""
        return {"type": "object", **(self.function.parameters or NO_PARAMETERS)}


class ToolChoiceFunction(RequestBody):
    """The name of one."""

    name: FunctionName


class NamedToolChoice(RequestBody):
    """The tool that is to be called."""

    type: Literal["function"]
    function: ToolChoiceFunction


class StructuredOutputParams(RequestBody):
    """The parameters of a chat request that shape its answer."""

    no_op_values: ClassVar[Mapping[str, Sequence[Any]]] = {"response_format": ({"type": "text"},), "tools": ([],)}
    response_format: ResponseFormat | None = None
    tools: list[Tool] = Field(default=[], max_length=128)
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice = "auto"
    parallel_tool_calls: bool = True

    @property
    def usable_tools(self) -> list[Tool]:
        """Tools that the model is told of."""
        return [] if self.tool_choice == "none" else self.tools

    def constraint(self) -> OutputConstraint | None:
        """What the answer is held to; None: nothing.

        Raises:
            InvalidRequest: two tools have one name, or one is to be called that isn't there.
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
        # A model that has tools may call them instead.
        calls = {tool.function.name: tool.arguments_schema for tool in self.usable_tools}
        return OutputConstraint(
            "response_format", schema, calls, parallel_tool_calls=bool(calls) and self.parallel_tool_calls
        )

    def _required_tools(self) -> list[Tool]:
        """The tools of which one must be called."""
        names = [tool.function.name for tool in self.tools]
        if twice := {name for name in names if names.count(name) > 1}:
            raise InvalidRequest(f"Two tools are called '{min(twice)}'; names must differ.", param="tools")
        if isinstance(self.tool_choice, NamedToolChoice):
            name = self.tool_choice.function.name
            if name not in names:
                raise InvalidRequest(f"'tool_choice' is '{name}', which isn't among 'tools'.", param="tool_choice")
            return [self.tools[names.index(name)]]
        if self.tool_choice == "required" and not names:
            raise InvalidRequest("'tool_choice' is 'required', and there are no 'tools'.", param="tool_choice")
        return self.tools if self.tool_choice == "required" else []

    def _schema(self) -> JsonSchema | None:
        if isinstance(self.response_format, JsonSchemaFormat):
            schema = self.response_format.json_schema.json_schema
            return {"type": "object"} if schema is None else schema
        return {"type": "object"} if self.response_format is not None else None
