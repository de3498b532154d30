"""`tool_choice`: which functions may be called, and the form of an answer that must be a call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxllm.config.sampling import StructuredOutputs
from jaxllm.server.errors import ApiError
from jaxllm.server.parsing.events import Tools
from jaxllm.server.schema.requests import NamedTool, Tool


def tools_of(tools: Sequence[Tool]) -> Tools:
    """Functions by name, as parsers take them."""
    return {tool.function.name: tool.function.parameters or {} for tool in tools}


def forced_schema(tools: Sequence[Tool], choice: NamedTool | str | None) -> StructuredOutputs | None:
    """The grammar of an answer that must be a call."""
    if choice in (None, "none", "auto"):
        return None
    if isinstance(choice, NamedTool):
        tools = [tool for tool in tools if tool.function.name == choice.function.name]
        if not tools:
            raise ApiError(
                400, f"tool_choice names {choice.function.name!r}, which is not in tools", param="tool_choice"
            )
    if not tools:
        raise ApiError(400, "tool_choice asks for a call, but there are no tools; give some", param="tool_choice")
    schemas = [_call_schema(tool) for tool in tools]
    return StructuredOutputs(json=schemas[0] if len(schemas) == 1 else {"anyOf": schemas})


def _call_schema(tool: Tool) -> dict[str, Any]:
    arguments = tool.function.parameters or {"type": "object"}
    return {
        "type": "object",
        "properties": {"name": {"const": tool.function.name}, "arguments": arguments},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }
