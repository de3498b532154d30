"""The chat templates of one model: which one is used, with which variables.

Inputs: templates by name, special tokens, and what the operator chose. Output: prompts. It does not know token ids.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

if TYPE_CHECKING:
    from jaxllm.tokenizer.chat_template import ChatTemplate
    from jaxllm.tokenizer.control_tokens import ControlTokens

DEFAULT, WITH_TOOLS = "default", "tool_use"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatOptions:
    """What an operator sets for every conversation.

    Attributes:
        template: a file, the name of one of the model's own templates, or Jinja source; None: the model's own.
        variables: template variables that a request may override.
        sanitize_control_tokens: control tokens in messages stay text.
    """

    template: str | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    sanitize_control_tokens: bool = True


@final
class Chat:
    """A model's templates. Each is compiled when it is first used.

    Args:
        templates: Jinja source by name; `default` and `tool_use` have the meaning that transformers gives them.
        special_tokens: names such as `bos_token` to their text.
    """

    def __init__(self, templates: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        self._templates, self._special_tokens = dict(templates), dict(special_tokens)
        self._compiled: dict[str, ChatTemplate] = {}
        self.options = ChatOptions()

    def configure(self, options: ChatOptions) -> None:
        """Take an operator's choice. Raises ValueError, in one line, where it cannot work."""
        if options.template is not None:
            self._templates = {DEFAULT: _source(options.template, self._templates)}
            self._compiled = {}
            self._template(DEFAULT)
        if options.variables:
            self._check_variables(options.variables)
        self.options = options

    @property
    def templates(self) -> dict[str, str]:
        """Jinja source by name."""
        return dict(self._templates)

    def source(self, *, with_tools: bool = False) -> str | None:
        """The Jinja source that a conversation, with or without tools, goes through; None: there is none."""
        name = self._name(with_tools)
        return None if name is None else self._templates[name]

    def variables(self) -> frozenset[str]:
        """Names that a request may set, for one of the templates at least."""
        return frozenset(name for template in self._templates for name in self._template(template).variables)

    def render(
        self,
        messages: Any,
        *,
        tools: Any = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
        control_tokens: ControlTokens | None = None,
    ) -> str:
        """The prompt. See `Tokenizer.apply_chat_template`."""
        name = self._name(bool(tools))
        if name is None:
            raise ValueError(self._no_template())
        return self._template(name).render(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables={**self.options.variables, **(variables or {})},
            control_tokens=control_tokens,
        )

    def _name(self, with_tools: bool) -> str | None:
        if with_tools and WITH_TOOLS in self._templates:
            return WITH_TOOLS
        if DEFAULT in self._templates:
            return DEFAULT
        return next(iter(self._templates)) if len(self._templates) == 1 else None

    def _no_template(self) -> str:
        if self._templates:
            names = ", ".join(sorted(self._templates))
            return (
                f"this model has chat templates for {names}, none of them the default; choose with --chat-template NAME"
            )
        return "this model has no chat template; use generate, or give one with --chat-template FILE"

    def _template(self, name: str) -> ChatTemplate:
        if name not in self._compiled:
            from jaxllm.tokenizer.chat_template import ChatTemplate

            self._compiled[name] = ChatTemplate(self._templates[name], self._special_tokens)
        return self._compiled[name]

    def _check_variables(self, variables: Mapping[str, Any]) -> None:
        known = self.variables()
        if self._templates and (unknown := sorted(set(variables) - known)):
            raise ValueError(
                f"the chat template does not read {', '.join(unknown)}, of the default chat template variables; "
                f"expected any of {', '.join(sorted(known))}"
            )


def _source(given: str, own: Mapping[str, str]) -> str:
    if given in own:
        return own[given]
    if "{{" in given or "{%" in given:
        return given
    try:
        return Path(os.path.expanduser(given)).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        names = f"; this model's own are named {', '.join(sorted(own))}" if len(own) > 1 else ""
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ValueError(f"cannot read the chat template {given!r}: {reason}{names}") from None
