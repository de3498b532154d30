#!/usr/bin/env python3
"""Two turns of a tool loop through each client that people use, against a running server: who works, which version.

    uv venv clients && uv pip install --python clients/bin/python -r scripts/client_matrix.txt
    (cd scripts/client_matrix_js && npm install)
    jaxllm serve & clients/bin/python scripts/client_matrix.py --base-url http://127.0.0.1:8000

Turn 1 must call the function (`tool_choice`), turn 2 gets its result and must say something. Every row is a client and
a way to use it. Not part of the tests: the clients are large, and change under us.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

QUESTION = "What is the weather in Paris? Use the function."
RESULT = "12 degrees and rain"
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
City = Literal["Paris", "Rome"]
DESCRIPTION = "The weather in a city."
FUNCTION = {"name": "get_weather", "description": DESCRIPTION, "parameters": PARAMETERS, "strict": True}
TOOL = {"type": "function", "function": FUNCTION}
LIMIT = 48


@dataclass(frozen=True)
class Server:
    """Where to and as whom."""

    url: str
    model: str
    key: str

    @property
    def v1(self) -> str:
        """The base of OpenAI's routes."""
        return f"{self.url}/v1"


def get_weather(city: City) -> str:
    """The weather in a city."""
    assert city in ("Paris", "Rome"), city
    return RESULT


# Frameworks make schemas of these, and not all of them resolve postponed annotations.
get_weather.__annotations__.update({"city": City, "return": str})


class Report(BaseModel):
    """What an answer may have to look like."""

    degrees: int


def said(text: str | None) -> str:
    """The last turn's text, which must not be empty."""
    assert text and text.strip(), f"turn 2 said {text!r}"
    return text


def results(calls: list[Any] | None) -> list[Any]:
    """OpenAI's messages with the results of calls."""
    assert calls, "turn 1 called nothing"
    return [
        {"role": "tool", "tool_call_id": c.id, "content": get_weather(**json.loads(c.function.arguments))}
        for c in calls
    ]


# openai


def openai_sync(server: Server) -> str:
    from openai import OpenAI

    client = OpenAI(base_url=server.v1, api_key=server.key)
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    first = client.chat.completions.create(
        model=server.model, messages=messages, tools=[TOOL], tool_choice="required", max_tokens=LIMIT
    )
    message = first.choices[0].message
    messages += [message, *results(message.tool_calls)]
    second = client.chat.completions.create(model=server.model, messages=messages, tools=[TOOL], max_tokens=LIMIT)
    return said(second.choices[0].message.content)


def openai_async_streamed(server: Server) -> str:
    from openai import AsyncOpenAI

    async def loop() -> str:
        client = AsyncOpenAI(base_url=server.v1, api_key=server.key)
        messages: list[Any] = [{"role": "user", "content": QUESTION}]
        options: dict[str, Any] = {"model": server.model, "tools": [TOOL], "max_tokens": LIMIT}
        async with client.chat.completions.stream(messages=messages, tool_choice="required", **options) as stream:
            message = (await stream.get_final_completion()).choices[0].message
        messages += [message.model_dump(exclude_none=True), *results(message.tool_calls)]
        text = ""
        async for chunk in await client.chat.completions.create(messages=messages, stream=True, **options):
            text += "".join(choice.delta.content or "" for choice in chunk.choices)
        return said(text)

    return asyncio.run(loop())


def openai_parse(server: Server) -> str:
    import openai

    class GetWeather(BaseModel):
        city: City

    client = openai.OpenAI(base_url=server.v1, api_key=server.key)
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    first = client.chat.completions.parse(
        model=server.model,
        messages=messages,
        tools=[openai.pydantic_function_tool(GetWeather)],
        tool_choice="required",
        max_tokens=LIMIT,
    )
    message = first.choices[0].message
    assert message.tool_calls[0].function.parsed_arguments.city in ("Paris", "Rome")
    messages += [message.model_dump(exclude={"parsed"}), *results(message.tool_calls)]
    second = client.chat.completions.parse(model=server.model, messages=messages, response_format=Report)
    assert isinstance(second.choices[0].message.parsed, Report)
    return said(second.choices[0].message.content)


def openai_responses(server: Server) -> str:
    from openai import OpenAI

    client = OpenAI(base_url=server.v1, api_key=server.key)
    tools: Any = [{"type": "function", **FUNCTION}]
    items: list[Any] = [{"role": "user", "content": QUESTION}]
    first = client.responses.create(
        model=server.model, input=items, tools=tools, tool_choice="required", max_output_tokens=LIMIT
    )
    items += first.output
    items += _outputs(first.output)
    second = client.responses.create(model=server.model, input=items, tools=tools, max_output_tokens=LIMIT)
    return said(second.output_text)


def openai_responses_streamed(server: Server) -> str:
    from openai import OpenAI

    client = OpenAI(base_url=server.v1, api_key=server.key)
    tools: Any = [{"type": "function", **FUNCTION}]
    options: dict[str, Any] = {"model": server.model, "tools": tools, "max_output_tokens": LIMIT}
    with client.responses.stream(input=QUESTION, tool_choice="required", **options) as stream:
        first = stream.get_final_response()
    results = _outputs(first.output)
    with client.responses.stream(input=results, previous_response_id=first.id, **options) as stream:
        return said(stream.get_final_response().output_text)


def _outputs(items: list[Any]) -> list[Any]:
    calls = [item for item in items if item.type == "function_call"]
    assert calls, items
    return [
        {"type": "function_call_output", "call_id": c.call_id, "output": get_weather(**json.loads(c.arguments))}
        for c in calls
    ]


# anthropic

_ANTHROPIC_TOOL = {"name": "get_weather", "description": DESCRIPTION, "input_schema": PARAMETERS}


def anthropic_sync(server: Server) -> str:
    from anthropic import Anthropic

    client = Anthropic(base_url=server.url, api_key=server.key)
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    options: Any = {"model": server.model, "tools": [_ANTHROPIC_TOOL], "max_tokens": LIMIT}
    assert client.messages.count_tokens(model=server.model, messages=messages).input_tokens > 0
    first = client.messages.create(messages=messages, tool_choice={"type": "any"}, **options)
    messages += _anthropic_turn(first.content)
    second = client.messages.create(messages=messages, **options)
    return said("".join(block.text for block in second.content if block.type == "text"))


def anthropic_streamed(server: Server) -> str:
    from anthropic import Anthropic

    client = Anthropic(base_url=server.url, api_key=server.key)
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    options: Any = {"model": server.model, "tools": [_ANTHROPIC_TOOL], "max_tokens": LIMIT}
    choice = {"type": "tool", "name": "get_weather"}
    with client.messages.stream(messages=messages, tool_choice=choice, **options) as stream:
        messages += _anthropic_turn(stream.get_final_message().content)
    with client.messages.stream(messages=messages, **options) as stream:
        return said("".join(stream.text_stream))


def _anthropic_turn(content: list[Any]) -> list[Any]:
    calls = [block for block in content if block.type == "tool_use"]
    assert calls, content
    results = [{"type": "tool_result", "tool_use_id": c.id, "content": get_weather(**c.input)} for c in calls]
    return [{"role": "assistant", "content": content}, {"role": "user", "content": results}]


# frameworks


def langchain_openai(server: Server, *, streamed: bool = False) -> str:
    from functools import reduce
    from operator import add

    from langchain_core.messages import HumanMessage
    from langchain_core.tools import tool
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(model=server.model, base_url=server.v1, api_key=server.key, max_tokens=LIMIT)

    def answer(bound: Any, messages: list[Any]) -> Any:
        return reduce(add, bound.stream(messages)) if streamed else bound.invoke(messages)

    weather = tool(get_weather)
    messages: list[Any] = [HumanMessage(QUESTION)]
    first = answer(model.bind_tools([weather], tool_choice="required"), messages)
    assert first.tool_calls, first
    messages += [first, *(weather.invoke(call) for call in first.tool_calls)]
    return said(answer(model.bind_tools([weather]), messages).text)


def llama_index(server: Server) -> str:
    from llama_index.core.base.llms.types import ChatMessage
    from llama_index.core.tools import FunctionTool
    from llama_index.llms.openai_like import OpenAILike

    model = OpenAILike(
        model=server.model,
        api_base=server.v1,
        api_key=server.key,
        is_chat_model=True,
        is_function_calling_model=True,
        max_tokens=LIMIT,
    )
    weather = FunctionTool.from_defaults(get_weather)
    history = [ChatMessage(role="user", content=QUESTION)]
    first = model.chat_with_tools([weather], chat_history=history, tool_required=True)
    history.append(first.message)
    for call in model.get_tool_calls_from_response(first):
        result = weather(**call.tool_kwargs)
        history.append(ChatMessage(role="tool", content=str(result), additional_kwargs={"tool_call_id": call.tool_id}))
    return said(model.chat_with_tools([weather], chat_history=history).message.content)


def litellm(server: Server) -> str:
    import litellm as lite

    options: Any = {"api_base": server.v1, "api_key": server.key, "tools": [TOOL], "max_tokens": LIMIT}
    text = ""
    for provider in ("openai", "hosted_vllm"):
        messages: list[Any] = [{"role": "user", "content": QUESTION}]
        name = f"{provider}/{server.model}"
        first = lite.completion(model=name, messages=messages, tool_choice="required", **options)
        message = first.choices[0].message
        messages += [message, *results(message.tool_calls)]
        text = said(lite.completion(model=name, messages=messages, **options).choices[0].message.content)
    return text


def instructor_mode(mode: str, server: Server) -> str:
    import instructor
    from openai import OpenAI

    class GetWeather(BaseModel):
        city: City

    client = instructor.from_openai(OpenAI(base_url=server.v1, api_key=server.key), mode=instructor.Mode[mode])
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    options: Any = {"model": server.model, "max_tokens": LIMIT, "max_retries": 0}
    first = client.chat.completions.create(messages=messages, response_model=GetWeather, **options)
    messages += [
        {"role": "assistant", "content": first.model_dump_json()},
        {"role": "user", "content": get_weather(first.city)},
    ]
    return said(client.chat.completions.create(messages=messages, response_model=Report, **options).model_dump_json())


def pydantic_ai(server: Server) -> str:
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    model = OpenAIChatModel(server.model, provider=OpenAIProvider(base_url=server.v1, api_key=server.key))
    agent = Agent(model, tools=[get_weather], model_settings=_first_required())
    return said(agent.run_sync(QUESTION).output)


def _first_required() -> Any:
    """Settings that demand a call in the first step alone."""

    def settings(context: Any) -> Any:
        return {"max_tokens": LIMIT} | ({"tool_choice": "required"} if context.run_step <= 1 else {})

    return settings


def openai_agents(kind: str, server: Server, *, streamed: bool = False) -> str:
    import agents
    from openai import AsyncOpenAI

    async def loop() -> str:
        agents.set_tracing_disabled(True)
        model = getattr(agents, kind)(
            model=server.model, openai_client=AsyncOpenAI(base_url=server.v1, api_key=server.key)
        )
        settings = agents.ModelSettings(tool_choice="required", max_tokens=LIMIT)
        tools = [agents.function_tool(get_weather)]
        agent = agents.Agent(name="weather", model=model, tools=tools, model_settings=settings, output_type=Report)
        if not streamed:
            return said(str((await agents.Runner.run(agent, QUESTION)).final_output))
        result = agents.Runner.run_streamed(agent, QUESTION)
        async for _ in result.stream_events():
            pass
        return said(str(result.final_output))

    return asyncio.run(loop())


def vercel(mode: str, server: Server) -> str:
    """The Vercel AI SDK, which runs in Node."""
    done = subprocess.run(
        ["node", "loop.mjs", mode, server.v1, server.model, server.key],
        cwd=Path(__file__).parent / "client_matrix_js",
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr.strip()[-400:]
    return said(done.stdout)


CLIENTS: list[tuple[str, str, Callable[[Server], str]]] = [
    ("openai", "chat", openai_sync),
    ("openai", "chat, async, streamed", openai_async_streamed),
    ("openai", "chat.completions.parse", openai_parse),
    ("openai", "responses", openai_responses),
    ("openai", "responses, streamed, previous_response_id", openai_responses_streamed),
    ("anthropic", "messages, count_tokens", anthropic_sync),
    ("anthropic", "messages, streamed", anthropic_streamed),
    ("langchain-openai", "bind_tools", langchain_openai),
    ("langchain-openai", "bind_tools, streamed", partial(langchain_openai, streamed=True)),
    ("llama-index-llms-openai-like", "chat_with_tools", llama_index),
    ("litellm", "openai/ and hosted_vllm/", litellm),
    ("instructor", "TOOLS", partial(instructor_mode, "TOOLS")),
    ("instructor", "JSON_SCHEMA", partial(instructor_mode, "JSON_SCHEMA")),
    ("pydantic-ai-slim", "Agent", pydantic_ai),
    ("openai-agents", "chat", partial(openai_agents, "OpenAIChatCompletionsModel")),
    ("openai-agents", "responses, streamed", partial(openai_agents, "OpenAIResponsesModel", streamed=True)),
    ("ai (Vercel)", "openai-compatible, generateText", partial(vercel, "chat")),
    ("ai (Vercel)", "openai (responses), streamText", partial(vercel, "responses")),
]


def main() -> int:
    """Run all, or those whose name contains `--only`; prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--api-key", default="none")
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    server, num_failed = Server(args.base_url, args.model, args.api_key), 0
    print("| client | version | way | two-turn tool loop | s |\n| --- | --- | --- | --- | --- |")
    for name, way, loop in CLIENTS:
        if args.only not in f"{name} {way}":
            continue
        start = time.perf_counter()
        try:
            loop(server)
            result = "works"
        except Exception as error:
            num_failed += 1
            result = f"fails: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        print(f"| {name} | {_version(name)} | {way} | {result} | {time.perf_counter() - start:.1f} |", flush=True)
    return 1 if num_failed else 0


def _version(name: str) -> str:
    if name.startswith("ai "):
        lock = Path(__file__).parent / "client_matrix_js" / "package.json"
        return json.loads(lock.read_text())["dependencies"]["ai"]
    return importlib.metadata.version(name)


if __name__ == "__main__":
    sys.exit(main())
