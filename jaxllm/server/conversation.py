"""The model's turn in a conversation: what chat completions, responses and messages have in common.

Inputs: messages, tools and sampling parameters as this project has them, whatever API they came by. Outputs: a
generation and the events (text, thoughts, calls) of its answers. It knows no API's shapes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from jaxllm.config.sampling import SamplingParams, StructuredOutputs
from jaxllm.engine.outputs import CompletionOutput
from jaxllm.parsing.events import ParsedAnswer, Parser, collect
from jaxllm.server.context import Context
from jaxllm.server.forced import FirstCall, ToolUse, arguments_schema
from jaxllm.server.generation import Generation


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """What to go on from.

    Attributes:
        messages: as OpenAI's chat API has them.
        use: what may be called.
        template: arguments of `Tokenizer.chat_prompt` beside messages and tools.
        variables: what the template may read beside them.
        extras: scheduling priority and the salt of cached prefixes, see `prompt_extras`.
    """

    messages: list[dict[str, Any]]
    use: ToolUse = field(default_factory=ToolUse)
    template: dict[str, Any] = field(default_factory=dict)
    variables: dict[str, Any] = field(default_factory=dict)
    extras: dict[str, Any] = field(default_factory=dict)


class Turn:
    """One answer, or `params.n`, to a conversation."""

    def __init__(self, ctx: Context, conversation: Conversation, params: SamplingParams):
        self._ctx, self._conversation = ctx, conversation
        self._format = ctx.answer_format
        use = conversation.use
        self.params = dataclasses.replace(
            params,
            structured_outputs=use.form() or params.structured_outputs,
            kept_special_tokens=self._format.kept_special_tokens(use.tools),
        )

    def prompt(self) -> dict[str, Any]:
        """The conversation as the model reads it. May take a while."""
        given = self._conversation
        tools = [tool.model_dump(exclude_none=True) for tool in given.use.shown]
        prompt = self._ctx.llm.get_tokenizer().chat_prompt(
            given.messages, tools=tools or None, chat_template_kwargs=given.variables, **given.template
        )
        return {**prompt, **given.extras}

    async def open(self, name: str, *, streamed: bool) -> Generation:
        """Start; see `AsyncLLM.open` for what is raised."""
        prompt = await self._ctx.llm.in_thread(self.prompt)
        params = self._constrained(prompt["prompt"])
        return await Generation.open(self._ctx, [prompt], params, name, streamed=streamed)

    def _constrained(self, prompt: str) -> SamplingParams:
        """The parameters with the form that an answer to this prompt has in the model's own format."""
        form, use = self.params.structured_outputs, self._conversation.use
        if not isinstance(form, StructuredOutputs):
            return self.params
        forced = {tool.function.name: arguments_schema(tool) for tool in use.forced}
        special = self._ctx.llm.get_tokenizer().special_token_ids
        form = self._format.constrained(form, prompt, special, forced, several=use.parallel is True)
        return dataclasses.replace(self.params, structured_outputs=form)

    def parser(self, generation: Generation) -> Parser:
        """A parser for one answer."""
        use, prompt = self._conversation.use, generation.outputs[0].prompt or ""
        parser = self._format.parser(use.tools, prompt, forced=bool(use.forced))
        return FirstCall(parser) if use.parallel is False else parser

    def read(self, generation: Generation, completion: CompletionOutput) -> ParsedAnswer:
        """A whole answer."""
        parser = self.parser(generation)
        return collect(parser.feed(completion.text) + parser.finish())

    def num_tokens(self, text: str) -> int:
        """Tokens of a part of an answer, for usage."""
        return len(self._ctx.llm.get_tokenizer().encode(text, add_special_tokens=False)) if text else 0
