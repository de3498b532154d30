"""Functions that a model may call, the calls it made, and how to choose among them: OpenAI's shapes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, model_validator

from jaxllm.schema.fields import Model, Name, Text

FunctionNameText = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_.:/-]{1,128}$")]
MAX_TOOLS = 128


class FunctionCall(Model):
    """A call the model made, as clients send it back; what it wrote wrongly stays as it is."""

    name: Name
    arguments: (
        Annotated[Text, Field(description="The text of a JSON object.", examples=["{}"])] | dict[str, Any] | None
    ) = None


class ToolCall(Model):
    """One entry of a message's `tool_calls`."""

    id: Name | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Function(Model):
    """A function the model may call; without parameters it takes none."""

    name: FunctionNameText
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Model):
    """One entry of `tools`."""

    type: Literal["function"]
    function: Function


class FunctionName(Model):
    """Which function `tool_choice` names."""

    name: Name


class NamedTool(Model):
    """A function by its name, as chat completions write it or, without `function`, as responses do."""

    type: Literal["function"]
    function: FunctionName

    @model_validator(mode="before")
    @classmethod
    def _nest(cls, given: Any) -> Any:
        if isinstance(given, dict) and "function" not in given and isinstance(given.get("name"), str):
            return {"type": given.get("type"), "function": {"name": given["name"]}}
        return given


class Allowed(Model):
    """Some of the tools, and whether one of them must be called."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MAX_TOOLS)]


class AllowedTools(Model):
    """OpenAI's `tool_choice` that allows some of the tools; responses write it without the inner object."""

    type: Literal["allowed_tools"]
    allowed_tools: Allowed

    @model_validator(mode="before")
    @classmethod
    def _nest(cls, given: Any) -> Any:
        if isinstance(given, dict) and "allowed_tools" not in given and "mode" in given:
            inner = {"mode": given["mode"], "tools": given.get("tools")}
            return {"type": given.get("type"), "allowed_tools": inner}
        return given
