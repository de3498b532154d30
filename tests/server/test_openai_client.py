"""The official client, over every feature that is listed."""

from __future__ import annotations

import asyncio
import json
import math

import openai
import pytest

from tests.server.live import KEY

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"unit": {"enum": ["C", "F"]}},
            "required": ["unit"],
            "additionalProperties": False,
        },
    },
}
HI = [{"role": "user", "content": "hi"}]


def test_completion_is_reproducible_and_streams_the_same_text(client):
    whole = client.completions.create(model="tiny", prompt="hello", max_tokens=24, temperature=0)
    pieces = list(client.completions.create(model="tiny", prompt="hello", max_tokens=24, temperature=0, stream=True))
    assert "".join(chunk.choices[0].text for chunk in pieces) == whole.choices[0].text
    assert whole.choices[0].finish_reason == pieces[-1].choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 24 and whole.usage.prompt_tokens == 5


@pytest.mark.parametrize("route", ["completions", "chat/completions", "responses"])
@pytest.mark.parametrize("stream", [False, True])
def test_several_tokens_at_a_time_only_for_who_waits_for_the_whole_answer(http, live, route, stream):
    name = f"decode-{route.replace('/', '-')}-{stream}"
    asked = {
        "completions": {"prompt": "hello", "max_tokens": 24},
        "chat/completions": {"messages": HI, "max_tokens": 24},
    }
    body = asked.get(route, {"input": "hi", "max_output_tokens": 24}) | {"temperature": 0, "stream": stream}
    http.post(f"/v1/{route}", json=body, headers={"x-request-id": name}).raise_for_status()
    steps = [r.num_steps for r in live.llm.engine.records if any(name in request for request in r.request_ids)]
    assert steps and (max(steps) > 1) is not stream


def test_batch_of_prompts_keeps_order_and_accepts_token_ids(client):
    texts = client.completions.create(model="tiny", prompt=["abc", "xyz"], max_tokens=8, temperature=0)
    ids = [list(b"abc"), list(b"xyz")]
    tokens = client.completions.create(model="tiny", prompt=ids, max_tokens=8, temperature=0)
    assert [c.text for c in texts.choices] == [c.text for c in tokens.choices]
    assert [c.index for c in texts.choices] == [0, 1]
    assert texts.choices[0].text != texts.choices[1].text


@pytest.mark.parametrize("stream", [False, True])
def test_n_completions_all_finish_and_differ(client, stream):
    answer = client.completions.create(
        model="tiny", prompt=["a", "b"], n=3, max_tokens=6, seed=7, temperature=1.5, stream=stream
    )
    if not stream:
        texts, reasons = [c.text for c in answer.choices], [c.finish_reason for c in answer.choices]
    else:
        texts, reasons = [""] * 6, [None] * 6
        for chunk in answer:
            for choice in chunk.choices:
                texts[choice.index] += choice.text
                reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert len(texts) == 6 and len(set(texts)) > 3
    assert all(reason in ("length", "stop") for reason in reasons)


def test_seed_makes_sampling_reproducible(client):
    def text(seed):
        answer = client.completions.create(model="tiny", prompt="x", max_tokens=16, temperature=1, seed=seed)
        return answer.choices[0].text

    assert text(1) == text(1) != text(2)


def test_echo_with_logprobs_scores_the_prompt(client):
    answer = client.completions.create(model="tiny", prompt="abcd", max_tokens=3, temperature=0, echo=True, logprobs=2)
    choice = answer.choices[0]
    assert choice.text.startswith("abcd")
    logprobs = choice.logprobs
    assert logprobs.tokens[:4] == list("abcd") and len(logprobs.tokens) == 7
    assert logprobs.token_logprobs[0] is None and all(v <= 0 for v in logprobs.token_logprobs[1:])
    assert logprobs.text_offset[:5] == [0, 1, 2, 3, 4]


def test_prompt_logprobs_equal_those_of_generation(client):
    """What the model generated greedily and reported must score the same when it is read as a prompt."""
    first = client.completions.create(
        model="tiny",
        prompt=list(b"abcd"),
        max_tokens=8,
        temperature=0,
        logprobs=0,
        extra_body={"return_token_ids": True},
    ).choices[0]
    ids = list(b"abcd") + first.token_ids
    again = client.completions.create(model="tiny", prompt=ids, max_tokens=0, echo=True, logprobs=0).choices[0]
    assert again.logprobs.token_logprobs[4:] == pytest.approx(first.logprobs.token_logprobs, abs=1e-4)


def test_logit_bias_forces_a_token(client):
    answer = client.completions.create(model="tiny", prompt="x", max_tokens=4, temperature=0, logit_bias={"65": 100})
    assert answer.choices[0].text == "AAAA"


def test_stop_string_ends_and_is_cut_off(client):
    bias = {"65": 100}
    answer = client.completions.create(
        model="tiny", prompt="x", max_tokens=9, temperature=0, logit_bias=bias, stop="AA"
    )
    assert answer.choices[0].text == "" and answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].stop_reason == "AA"
    kept = client.completions.create(
        model="tiny",
        prompt="x",
        max_tokens=9,
        temperature=0,
        logit_bias=bias,
        stop=["AA"],
        extra_body={"include_stop_str_in_output": True},
    )
    assert kept.choices[0].text == "AA"


def test_chat_stream_has_role_first_reason_last_and_usage_alone(client):
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=HI, max_tokens=10, temperature=0, stream=True, stream_options={"include_usage": True}
        )
    )
    whole = client.chat.completions.create(model="tiny", messages=HI, max_tokens=10, temperature=0)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 10
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens


def test_chat_logprobs_rank_alternatives(client):
    answer = client.chat.completions.create(
        model="tiny", messages=HI, max_tokens=5, temperature=0, logprobs=True, top_logprobs=3
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == 5
    for entry in content:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == entry.top_logprobs[0].logprob  # greedy takes the likeliest
        assert entry.bytes and math.isfinite(entry.logprob)
    streamed = client.chat.completions.create(
        model="tiny", messages=HI, max_tokens=5, temperature=0, logprobs=True, top_logprobs=3, stream=True
    )
    got = [e for c in streamed if c.choices and c.choices[0].logprobs for e in c.choices[0].logprobs.content]
    assert [e.token for e in got] == [e.token for e in content]


def test_json_schema_answer_is_valid(client):
    schema = WEATHER["function"]["parameters"]
    form = {"type": "json_schema", "json_schema": {"name": "w", "schema": schema, "strict": True}}
    for seed in range(4):
        answer = client.chat.completions.create(
            model="tiny", messages=HI, max_tokens=200, seed=seed, response_format=form
        )
        assert json.loads(answer.choices[0].message.content)["unit"] in ("C", "F")
        assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("form", "allowed"),
    [
        ({"regex": "[ab]{3}c"}, lambda t: len(t) == 4 and t[-1] == "c" and set(t[:3]) <= {"a", "b"}),
        ({"choice": ["yes", "no"]}, lambda t: t in ("yes", "no")),
        ({"grammar": 'start: "<" /[0-9]{2}/ ">"'}, lambda t: t[0] == "<" and t[1:3].isdigit() and t[3:] == ">"),
        ({"json": {"type": "boolean"}}, lambda t: t in ("true", "false")),
    ],
)
def test_structured_outputs_hold(client, form, allowed):
    for seed in range(3):
        answer = client.completions.create(
            model="tiny", prompt="x", max_tokens=60, seed=seed, extra_body={"structured_outputs": form}
        )
        assert allowed(answer.choices[0].text), answer.choices[0].text


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_forced_tool_call_is_valid_json(client, choice):
    answer = client.chat.completions.create(
        model="tiny", messages=HI, max_tokens=300, tools=[WEATHER], tool_choice=choice, seed=3
    )
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "weather" and json.loads(call.function.arguments)["unit"] in ("C", "F")
    assert answer.choices[0].finish_reason == "tool_calls" and answer.choices[0].message.content is None


def test_streamed_tool_call_concatenates_to_valid_json(client):
    stream = client.chat.completions.create(
        model="tiny", messages=HI, max_tokens=300, tools=[WEATHER], tool_choice="required", seed=5, stream=True
    )
    name = arguments = ""
    for chunk in stream:
        for call in chunk.choices[0].delta.tool_calls or []:
            name, arguments = name + (call.function.name or ""), arguments + call.function.arguments
        reason = chunk.choices[0].finish_reason
    assert name == "weather" and json.loads(arguments)["unit"] in ("C", "F") and reason == "tool_calls"


def test_conversation_with_tool_results_is_understood(client):
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"unit": "C"}'}}
    messages = [
        *HI,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "12"},
        {"role": "user", "content": [{"type": "text", "text": "and now?"}]},
    ]
    answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=3, tools=[WEATHER])
    assert answer.usage.completion_tokens >= 1


def test_responses_text_and_stream(client):
    whole = client.responses.create(model="tiny", input="hi", max_output_tokens=12, temperature=0)
    events = list(client.responses.create(model="tiny", input="hi", max_output_tokens=12, temperature=0, stream=True))
    text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert text == whole.output_text and whole.status == "incomplete"
    assert events[0].type == "response.created" and events[-1].type == "response.incomplete"
    assert [e.sequence_number for e in events] == list(range(len(events)))


def test_embeddings_have_unit_length_and_tell_texts_apart(client):
    answer = client.embeddings.create(model="tiny", input=["one text", "another", "one text"])
    a, b, c = (item.embedding for item in answer.data)
    assert math.isclose(sum(x * x for x in a), 1.0, rel_tol=1e-5)
    assert a == c != b
    plain = client.embeddings.create(model="tiny", input=list(b"one text"), encoding_format="float")
    assert plain.data[0].embedding == pytest.approx(a, abs=1e-6)
    long = client.embeddings.create(model="tiny", input="x" * 300)  # several chunks
    assert math.isclose(sum(x * x for x in long.data[0].embedding), 1.0, rel_tol=1e-5)


def test_models_are_listed_and_found(client):
    assert [m.id for m in client.models.list()] == ["tiny", "alias"]
    assert client.models.retrieve("alias").id == "alias"
    assert client.completions.create(model="alias", prompt="x", max_tokens=1).model == "alias"


def test_errors_arrive_as_the_clients_own(client, live):
    with pytest.raises(openai.NotFoundError, match="not served"):
        client.completions.create(model="nope", prompt="x")
    with pytest.raises(openai.BadRequestError, match="temperature") as error:
        client.completions.create(model="tiny", prompt="x", temperature=-1)
    assert error.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="max_model_len"):
        client.completions.create(model="tiny", prompt="x" * 600)
    wrong = openai.OpenAI(base_url=f"{live.url}/v1", api_key="wrong", max_retries=0)
    with wrong, pytest.raises(openai.AuthenticationError):
        wrong.models.list()


def test_async_client_runs_many_streams_at_once(live):
    async def main() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key=KEY, max_retries=0) as client:

            async def one(i: int) -> str:
                stream = await client.chat.completions.create(
                    model="tiny", messages=HI, max_tokens=20, temperature=0, stream=True
                )
                return "".join([c.choices[0].delta.content or "" async for c in stream])

            return await asyncio.gather(*(one(i) for i in range(24)))

    texts = asyncio.run(main())
    assert len(set(texts)) == 1 and texts[0]


def test_async_client_completion_embedding_and_response(live):
    async def main() -> None:
        async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key=KEY, max_retries=0) as client:
            completion, embedding, response = await asyncio.gather(
                client.completions.create(model="tiny", prompt="x", max_tokens=3, temperature=0, logprobs=1),
                client.embeddings.create(model="tiny", input="x"),
                client.responses.create(model="tiny", input="x", max_output_tokens=3),
            )
            assert len(completion.choices[0].logprobs.tokens) == 3
            assert len(embedding.data[0].embedding) == 32 and response.output_text is not None

    asyncio.run(main())
