"""A turn asks the engine for what the parser of its answer needs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from jaxllm.config.sampling import SamplingParams, StructuredOutputs
from jaxllm.parsing.registry import AnswerFormat
from jaxllm.schema.tools import Tool
from jaxllm.server.conversation import Conversation, Turn
from jaxllm.server.forced import ToolUse
from jaxllm.tokenizer import load_tokenizer
from tests.helpers.byte_tokenizer import write_byte_tokenizer

WEATHER = Tool.model_validate({"type": "function", "function": {"name": "weather"}})


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Any:
    tokenizer = load_tokenizer(write_byte_tokenizer(tmp_path_factory.mktemp("bytes")))
    return SimpleNamespace(get_tokenizer=lambda: tokenizer)


def turn(llm: Any, calls: str, thinking: str, use: ToolUse, **fields: Any) -> Turn:
    ctx: Any = SimpleNamespace(llm=llm, answer_format=AnswerFormat.chosen(None, calls, thinking))
    conversation = Conversation(messages=[{"role": "user", "content": "hi"}], use=use)
    return Turn(ctx, conversation, SamplingParams(**fields))


def test_markers_stay_in_the_text_of_who_may_use_them(llm):
    use = ToolUse.chosen([WEATHER], None)
    assert "[TOOL_CALLS]" in turn(llm, "mistral", "none", use).params.kept_special_tokens
    assert turn(llm, "mistral", "none", ToolUse()).params.kept_special_tokens == ()
    assert "<|channel|>" in turn(llm, "openai", "openai_gptoss", ToolUse()).params.kept_special_tokens


def test_a_forced_call_has_the_form_of_the_model(llm):
    use = ToolUse.chosen([WEATHER], "required")
    form = turn(llm, "hermes", "none", use)._constrained("").structured_outputs
    assert isinstance(form, StructuredOutputs) and form.grammar is not None and "<tool_call>" in form.grammar
    form = turn(llm, "auto", "none", use)._constrained("").structured_outputs
    assert isinstance(form, StructuredOutputs) and form.json is not None


def test_a_request_without_a_form_has_none(llm):
    assert turn(llm, "hermes", "qwen3", ToolUse())._constrained("<think>").structured_outputs is None
