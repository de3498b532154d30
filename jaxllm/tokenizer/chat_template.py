"""Render a conversation with the model's own chat template.

Inputs: Jinja source that came with a model (not trusted), messages, tools. Output: the prompt text. It does
not know token ids. Errors are one-line `ValueError`s.
"""

from __future__ import annotations

import contextvars
from collections.abc import Mapping
from typing import Any, final

from jinja2 import TemplateError

from jaxllm.tokenizer.messages import plain, plain_messages, plain_tools
from jaxllm.tokenizer.template_budget import Budget, TemplateLimitError, current_budget
from jaxllm.tokenizer.template_environment import BoundedEnvironment

MAX_TEMPLATE_CHARS = 200_000
MAX_PROMPT_CHARS = 32_000_000

# What published templates read beyond messages, tools and special tokens. Any other name is refused, so
# that a request cannot replace what the server or the tokenizer sets.
_THINKING = ("enable_thinking", "thinking", "thinking_budget", "preserve_thinking", "clear_thinking")
_TOOLS = ("builtin_tools", "custom_tools", "tools_in_user_message", "xml_tools", "python_tools")
_OTHERS = ("reasoning_effort", "documents", "date_string", "model_identity", "controls")
ALLOWED_VARIABLES = frozenset([*_THINKING, *_TOOLS, *_OTHERS])


@final
class ChatTemplate:
    """One compiled template; rendering is safe from several threads."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        if len(source) > MAX_TEMPLATE_CHARS:
            raise ValueError(
                f"the chat template has {len(source)} characters; expected at most {MAX_TEMPLATE_CHARS}; "
                "check the model's files"
            )
        self._special_tokens = dict(special_tokens)
        try:
            self._template = BoundedEnvironment().bounded_template(source)
        except Exception as error:  # deep nesting also surfaces as SyntaxError, RecursionError, MemoryError
            raise ValueError(f"the chat template does not compile: {_one_line(error)}") from None

    def render(
        self,
        messages: Any,
        *,
        tools: Any = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt. See `Tokenizer.apply_chat_template`."""
        context = _checked_variables(variables or {}) | {
            "messages": plain_messages(messages),
            "tools": plain_tools(tools),
            "add_generation_prompt": add_generation_prompt,
            **self._special_tokens,
        }
        # A context of its own: the budget must not leak into, or from, whoever renders next on this thread.
        prompt = contextvars.copy_context().run(self._render, context)
        if len(prompt) > MAX_PROMPT_CHARS:
            raise TemplateLimitError(f"the prompt has more than {MAX_PROMPT_CHARS} characters; shorten it")
        return prompt

    def _render(self, context: dict[str, Any]) -> str:
        current_budget.set(Budget())
        try:
            return self._template.render(context)
        except TemplateLimitError:
            raise
        except TemplateError as error:
            raise ValueError(f"the chat template refused these messages: {_one_line(error)}") from None
        except Exception as error:  # whatever a template can provoke is the template's failure
            raise ValueError(f"the chat template failed: {type(error).__name__}: {_one_line(error)}") from None


def _checked_variables(variables: Mapping[str, Any]) -> dict[str, Any]:
    unknown = sorted(set(variables) - ALLOWED_VARIABLES)
    if unknown:
        raise ValueError(
            f"chat template variables {', '.join(unknown)} are not allowed; "
            f"expected any of {', '.join(sorted(ALLOWED_VARIABLES))}"
        )
    return {name: plain(value, name) for name, value in variables.items()}


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500]
