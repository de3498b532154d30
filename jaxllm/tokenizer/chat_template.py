"""Render a conversation with the model's own chat template.

Inputs: Jinja source that came with a model (not trusted), messages, tools. Output: the prompt text. It does
not know token ids. Errors are one-line `ValueError`s.
"""

from __future__ import annotations

import contextvars
from collections.abc import Mapping, Sequence
from typing import Any, final

from jinja2 import meta, nodes

from jaxllm.tokenizer.control_tokens import ControlTokens
from jaxllm.tokenizer.message_shapes import Shaped, shaped
from jaxllm.tokenizer.messages import Message, plain, plain_messages, plain_tools
from jaxllm.tokenizer.template_budget import Budget, TemplateLimitError, current_budget
from jaxllm.tokenizer.template_dialect import PROBE_TOOL, Dialect
from jaxllm.tokenizer.template_environment import BoundedEnvironment
from jaxllm.tokenizer.template_errors import failure, one_line
from jaxllm.tokenizer.template_operations import GLOBALS

MAX_TEMPLATE_CHARS = 200_000
MAX_PROMPT_CHARS = 32_000_000

# What published templates read beyond messages, tools and special tokens. Clients send these to any model, so they
# are accepted by templates that do not read them; any other name must be one that the template reads.
_THINKING = ("enable_thinking", "thinking", "thinking_budget", "preserve_thinking", "clear_thinking")
_TOOLS = ("builtin_tools", "custom_tools", "tools_in_user_message", "xml_tools", "python_tools")
_OTHERS = ("reasoning_effort", "documents", "date_string", "model_identity", "controls")
ALLOWED_VARIABLES = frozenset([*_THINKING, *_TOOLS, *_OTHERS])
# What the server or the tokenizer sets: a request must not replace it.
_RESERVED = frozenset(
    ["messages", "tools", "add_generation_prompt", "chat_template", "continue_final_message", *GLOBALS]
)
_SHARE_OF_PROBE, _SHARE_OF_SEARCH = 0.05, 0.25  # of the bounds of a rendering, for the few beside it
_END_MARK = "\ufdd2"  # a noncharacter: no text has it


@final
class ChatTemplate:
    """One compiled template; rendering is safe from several threads.

    Attributes:
        variables: names that a request may set.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        if len(source) > MAX_TEMPLATE_CHARS:
            raise ValueError(
                f"the chat template has {len(source)} characters; expected at most {MAX_TEMPLATE_CHARS}; "
                "check the model's files"
            )
        self._special_tokens = dict(special_tokens)
        try:
            environment = BoundedEnvironment()
            tree = environment.parse(source)
            literals, read = _literals(tree), meta.find_undeclared_variables(tree)
            self._template = environment.bounded_template(source)
        except Exception as error:  # deep nesting also surfaces as SyntaxError, RecursionError, MemoryError
            raise ValueError(f"the chat template does not compile: {one_line(error)}") from None
        self.variables = (ALLOWED_VARIABLES | read) - _RESERVED - self._special_tokens.keys()
        self._dialect = Dialect(self._tried, literals)

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
        """The prompt. See `Tokenizer.apply_chat_template`.

        With `control_tokens`, those that the arguments contain are marked, for `ControlTokens.encode`.
        """
        if add_generation_prompt is None:
            add_generation_prompt = not continue_final_message
        if add_generation_prompt and continue_final_message:
            raise ValueError(
                "continue_final_message and add_generation_prompt exclude each other: the first continues the last "
                "message, the second begins an answer; set one"
            )
        conversation = shaped(plain_messages(messages), self._dialect)
        given = {"tools": plain_tools(tools), **self._checked(variables or {})}
        if control_tokens is not None:
            conversation = [(n, control_tokens.mark(message)) for n, message in conversation]
            given = control_tokens.mark(given)
        context = given | {"add_generation_prompt": add_generation_prompt, **self._special_tokens}
        if continue_final_message:
            return _cut(self._located(_with_end_mark(conversation), context))
        return self._located(conversation, context)

    def _located(self, conversation: Shaped, context: dict[str, Any]) -> str:
        """The prompt; where the template fails, the message at which it does."""
        messages = [message for _, message in conversation]
        try:
            prompt = self._run(messages, context)
        except TemplateLimitError:
            raise
        except Exception as error:  # whatever a template can provoke is the template's failure
            where = self._failing(messages, context)
            place = None if where is None else (conversation[where][0], messages[where]["role"])
            raise ValueError(failure(error, place)) from None
        if len(prompt) > MAX_PROMPT_CHARS:
            raise TemplateLimitError(f"the prompt has more than {MAX_PROMPT_CHARS} characters; shorten it")
        return prompt

    def _failing(self, messages: Sequence[Message], context: dict[str, Any]) -> int | None:
        """The message with which the template begins to fail, by halving; None where it fails with any."""
        low, high = 0, len(messages)  # renders the first `low`, fails on the first `high`
        while high - low > 1:
            middle = (low + high) // 2
            if self._attempt(messages[:middle], context, _SHARE_OF_SEARCH) is None:
                high = middle
            else:
                low = middle
        return high - 1 if low or len(messages) == 1 else None

    def _tried(self, messages: Sequence[Message], with_tool: bool) -> str | None:
        tools = [plain(PROBE_TOOL, "tools")] if with_tool else None
        context = {"tools": tools, "add_generation_prompt": True, **self._special_tokens}
        return self._attempt(messages, context, _SHARE_OF_PROBE)

    def _attempt(self, messages: Sequence[Message], context: Mapping[str, Any], share: float) -> str | None:
        try:
            return self._run(messages, context, share)
        except Exception:  # a failure is what is asked for here
            return None

    def _run(self, messages: Sequence[Message], context: Mapping[str, Any], share: float = 1.0) -> str:
        # A context of its own: the budget must not leak into, or from, whoever renders next on this thread.
        return contextvars.copy_context().run(self._render, {**context, "messages": list(messages)}, share)

    def _render(self, context: dict[str, Any], share: float) -> str:
        current_budget.set(Budget(share))
        return self._template.render(context)

    def _checked(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        if unknown := sorted(set(variables) - self.variables):
            raise ValueError(
                f"chat template variables {', '.join(unknown)} are not allowed; "
                f"expected any of {', '.join(sorted(self.variables))}"
            )
        return {name: plain(value, name) for name, value in variables.items()}


def _literals(tree: nodes.Template) -> frozenset[str]:
    constants = {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    return frozenset(constants | {node.attr for node in tree.find_all(nodes.Getattr)})


def _with_end_mark(conversation: Shaped) -> Shaped:
    """The conversation with a mark, and a space, behind its last text."""
    *before, (origin, message) = conversation
    content, mark = message.get("content"), _END_MARK + " "
    if isinstance(content, str) and content:
        return [*before, (origin, {**message, "content": content + mark})]
    if isinstance(content, list) and content:
        *parts, last = content
        return [*before, (origin, {**message, "content": [*parts, {**last, "text": last["text"] + mark}]})]
    raise ValueError("continue_final_message needs text in the last message; give some, or leave it out")


def _cut(prompt: str) -> str:
    """The prompt up to the mark. A template that trimmed the space has trimmed what was before the mark as well."""
    before, mark, after = prompt.rpartition(_END_MARK)
    if not mark:
        raise ValueError(
            "continue_final_message is set, but the chat template does not show the end of the last message; "
            "send it without continue_final_message"
        )
    return before if after.startswith(" ") else before.rstrip()
