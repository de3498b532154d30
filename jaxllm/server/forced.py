"""`tool_choice`: which functions the model sees and may call, and the form of an answer that must be calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jaxllm.config.sampling import StructuredOutputs
from jaxllm.parsing.events import CallArguments, CallEnd, CallStart, Event, Parser, Tools
from jaxllm.parsing.grammar import MOST_CALLS
from jaxllm.schema.tools import AllowedTools, NamedTool, Tool
from jaxllm.server.errors import ApiError

Mode = Literal["none", "auto", "required"]
Choice = Mode | NamedTool | AllowedTools | None
_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}
_SAYS_NOTHING = frozenset(("type", "title", "description", "required", "properties", "$schema"))


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """What one answer may call.

    Attributes:
        shown: functions in the prompt; the model's calls of these are found in its answer.
        forced: functions of which one must be called; empty where none need be.
        parallel: whether there may be several calls; None: as many as the model likes, but one where it must call.
    """

    shown: tuple[Tool, ...] = ()
    forced: tuple[Tool, ...] = ()
    parallel: bool | None = None

    @classmethod
    def chosen(cls, tools: Sequence[Tool] | None, choice: Choice, parallel: bool | None = None) -> ToolUse:
        """By OpenAI's `tools`, `tool_choice` and `parallel_tool_calls`. Raises ApiError."""
        tools = tuple(tools or ())
        if choice == "none":
            return cls()
        if isinstance(choice, AllowedTools):
            names = [tool.function.name for tool in choice.allowed_tools.tools]
            tools, mode = _named(tools, names), choice.allowed_tools.mode
            return cls(shown=tools, forced=tools if mode == "required" else (), parallel=parallel)
        if isinstance(choice, NamedTool):
            return cls(shown=tools, forced=_named(tools, [choice.function.name]), parallel=False)
        if choice == "required" and not tools:
            raise ApiError(400, "tool_choice asks for a call, but there are no tools; give some", param="tool_choice")
        return cls(shown=tools, forced=tools if choice == "required" else (), parallel=parallel)

    @property
    def tools(self) -> Tools:
        """Functions by name, as parsers take them."""
        return {tool.function.name: tool.function.parameters or {} for tool in self.shown}

    def form(self) -> StructuredOutputs | None:
        """The grammar of an answer that must be calls."""
        if not self.forced:
            return None
        calls = [_call_schema(tool, f"#/$defs/{n}") for n, tool in enumerate(self.forced)]
        call = calls[0] if len(calls) == 1 else {"anyOf": calls}
        if self.parallel:
            call = {"type": "array", "items": call, "minItems": 1, "maxItems": MOST_CALLS}
        definitions = {str(n): _rebased(arguments_schema(tool), f"#/$defs/{n}") for n, tool in enumerate(self.forced)}
        return StructuredOutputs(json={**call, "$defs": definitions})


def _named(tools: Sequence[Tool], names: Sequence[str]) -> tuple[Tool, ...]:
    known = {tool.function.name for tool in tools}
    for name in names:
        if name not in known:
            raise ApiError(400, f"tool_choice names {name[:100]!r}, which is not in tools", param="tool_choice")
    return tuple(tool for tool in tools if tool.function.name in names)


def arguments_schema(tool: Tool) -> dict[str, Any]:
    """The schema of a function's arguments; one that names none has none."""
    schema = tool.function.parameters or {}
    if not schema.get("properties") and not schema.get("required") and set(schema) <= _SAYS_NOTHING:
        return _NO_ARGUMENTS
    return schema if "type" in schema or "$ref" in schema else {"type": "object", **schema}


def _call_schema(tool: Tool, arguments: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"name": {"const": tool.function.name}, "arguments": {"$ref": arguments}},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _rebased(schema: Any, root: str) -> Any:
    """The schema with its references to itself going to where it now stands."""
    if isinstance(schema, list):
        return [_rebased(part, root) for part in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _rebased(value, root) for key, value in schema.items()}
    if isinstance(ref := schema.get("$ref"), str) and ref.startswith("#"):
        moved["$ref"] = root + ref[1:]
    return moved


class FirstCall:
    """A parser that passes on one call and drops the others: `parallel_tool_calls: false`."""

    def __init__(self, parser: Parser):
        self._parser, self._num_calls = parser, 0

    def feed(self, text: str) -> list[Event]:
        """What is certain now."""
        return self._kept(self._parser.feed(text))

    def finish(self) -> list[Event]:
        """What was held back."""
        return self._kept(self._parser.finish())

    def _kept(self, events: Sequence[Event]) -> list[Event]:
        kept: list[Event] = []
        for event in events:
            self._num_calls += isinstance(event, CallStart)
            if self._num_calls < 2 or not isinstance(event, CallStart | CallArguments | CallEnd):
                kept.append(event)
        return kept
