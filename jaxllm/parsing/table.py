"""Every format by the name that vLLM gives it, and what the chat templates of each contain: a format is one entry."""

from __future__ import annotations

from jaxllm.parsing import gemma, harmony, json_formats, parameter_formats, pythonic
from jaxllm.parsing.formats import CallFormat, Thinking

CALL_FORMATS: dict[str, CallFormat] = {
    "cohere_command3": json_formats.objects("<|START_ACTION|>", "Action: ```json", close="<|END_ACTION|>"),
    "deepseek_v3": json_formats.DEEPSEEK,
    "deepseek_v31": json_formats.DEEPSEEK,
    "deepseek_v32": parameter_formats.DEEPSEEK_V32,
    "ernie45": json_formats.HERMES,
    "functionary": parameter_formats.QWEN3_CODER,
    "gemma4": gemma.GEMMA4,
    "gigachat3": json_formats.objects("<|function_call|>", "function call<|role_sep|>"),
    "glm45": parameter_formats.GLM,
    "glm47": parameter_formats.GLM,
    "granite": json_formats.GRANITE,
    "granite-20b-fc": json_formats.objects("<function_call>"),
    "granite4": json_formats.HERMES,
    "hermes": json_formats.HERMES,
    "hunyuan_a13b": json_formats.TOOL_CALLS,
    "internlm": json_formats.objects("<|action_start|><|plugin|>", close="<|action_end|>"),
    "jamba": json_formats.TOOL_CALLS,
    "kimi_k2": json_formats.KIMI,
    "lfm2": pythonic.LFM2,
    "llama3_json": json_formats.LLAMA3,
    "llama4_json": json_formats.LLAMA3,
    "llama4_pythonic": pythonic.LLAMA4,
    "longcat": json_formats.objects("<longcat_tool_call>", close="</longcat_tool_call>"),
    "minimax": json_formats.TOOL_CALLS,
    "minimax_m2": parameter_formats.MINIMAX_M2,
    "mistral": json_formats.MISTRAL,
    "nemotron_json": json_formats.objects("<TOOLCALL>", close="</TOOLCALL>"),
    "olmo3": pythonic.OLMO3,
    "openai": harmony.HARMONY,
    "phi4_mini_json": json_formats.objects("functools"),
    "pythonic": pythonic.PYTHONIC,
    "qwen3_coder": parameter_formats.QWEN3_CODER,
    "qwen3_xml": parameter_formats.QWEN3_CODER,
    "seed_oss": parameter_formats.SEED,
    "xlam": json_formats.LLAMA3,
}

_TAGS = Thinking(starts=("<think>",), ends=("</think>",))
_TAGS_FROM_START = Thinking(starts=("<think>",), ends=("</think>",), from_start=True)
THINKING: dict[str, Thinking] = {
    "cohere_command3": Thinking(starts=("<|START_THINKING|>",), ends=("<|END_THINKING|>",)),
    "deepseek_r1": _TAGS_FROM_START,
    "deepseek_v3": _TAGS,
    "ernie45": _TAGS,
    "gemma4": Thinking(starts=("<|channel>thought\n", "<|channel>"), ends=("<channel|>",)),
    "glm45": _TAGS,
    "granite": Thinking(
        starts=("<think>", "Here is my thought process:", "Here's my thought process:"),
        ends=("</think>", "Here is my response:", "Here's my response:"),
    ),
    "holo2": _TAGS,
    "hunyuan_a13b": Thinking(starts=("<think>",), ends=("</think>\n<answer>", "</think>")),
    "kimi_k2": _TAGS,
    "minimax_m2": _TAGS_FROM_START,
    "mistral": Thinking(starts=("[THINK]",), ends=("[/THINK]",)),
    "nemotron_v3": _TAGS,
    "olmo3": _TAGS,
    "openai_gptoss": harmony.HARMONY_THINKING,
    "qwen3": _TAGS,
    "seed_oss": Thinking(starts=("<seed:think>",), ends=("</seed:think>",)),
    "step3": _TAGS_FROM_START,
}

# What only the templates of one format contain, the most telling first.
CALL_SIGNS = (
    ("<|channel|>analysis", "openai"),
    ("<|tool_calls_section_begin|>", "kimi_k2"),
    ("｜DSML｜", "deepseek_v32"),
    ("<｜tool▁calls▁begin｜>", "deepseek_v3"),
    ("<|tool_call>", "gemma4"),
    ("<|START_ACTION|>", "cohere_command3"),
    ("Action: ```json", "cohere_command3"),
    ("<TOOLCALL>", "nemotron_json"),
    ("<|function_call|>", "gigachat3"),
    ("function call<|role_sep|>", "gigachat3"),
    ("<minimax:tool_call>", "minimax_m2"),
    ("<seed:tool_call>", "seed_oss"),
    ("<longcat_tool_call>", "longcat"),
    ("<arg_key>", "glm45"),
    ("<function=", "qwen3_coder"),
    ("[TOOL_CALLS]", "mistral"),
    ("<|tool_call_start|>", "lfm2"),
    ("<|tool_list_start|>", "lfm2"),
    ("<|tool_call|>", "granite"),
    ("<tool_calls>", "jamba"),
    ("<tool_call>", "hermes"),
    ("<function_calls>", "olmo3"),
    ("<|python_start|>", "llama4_pythonic"),
    ("ipython", "llama3_json"),
)
THINKING_SIGNS = (
    ("<|channel|>analysis", "openai_gptoss"),
    ("<|START_THINKING|>", "cohere_command3"),
    ("<|channel>thought", "gemma4"),
    ("[THINK]", "mistral"),
    ("<seed:think>", "seed_oss"),
    ("</think>", "qwen3"),
    ("Here is my thought process:", "granite"),
)
