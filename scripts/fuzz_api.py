"""Fuzz a running server with what its own OpenAPI document allows, and with what it forbids (Schemathesis).

    python scripts/fuzz_api.py --base-url http://127.0.0.1:8000 --api-key k --cases 2000

Half of the requests fit the document and most of those must be accepted; the other half break it. No answer may be a
5xx (but 503 with retry-after) or late, every answer must have its documented shape, and a stream its events and its
end; exit code 1 otherwise. Of the valid half seven in eight are mended where JSON schema cannot say what is valid (a
regex that compiles, min_tokens up to max_tokens, ...).
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

_SECONDS = 60
_MOST_TOKENS = 4
_MOST_COMPLETIONS = 8
_MOST_EVENTS = 100_000  # Schemathesis stops reading a stream after a few
_LIMITS = {"/v1/chat/completions": "max_completion_tokens", "/v1/responses": "max_output_tokens"}
_LAST_EVENTS = ("event: response.completed", "event: response.incomplete", "event: message_stop")
_REGEXES = ("[a-z]+", "(yes|no)", r"\d{1,3}", "a?b*c")
_GRAMMARS = ('start: "yes" | "no"', "start: /[a-z]{1,5}/", 'start: item+\nitem: "x" | "y"')
_SCHEMAS = (
    {"type": "object"},
    {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False},
    {"type": "array", "items": {"enum": ["x", "y"]}, "maxItems": 3},
    {"anyOf": [{"type": "boolean"}, {"type": "null"}]},
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base-url", default="http://127.0.0.1:8000")
    parser.add_argument("--api-key")
    parser.add_argument("--cases", type=int, default=2000)
    args = parser.parse_args()
    report = fuzz(args.base_url, args.api_key, args.cases)
    print(json.dumps(report))
    return 1 if report["problems"] else 0


def fuzz(base_url: str, api_key: str | None, num_cases: int) -> dict[str, Any]:
    """Send about `num_cases` requests, spread over operations, half of them meant to be wrong.

    Returns:
        `cases`, the share `accepted`, counts per status, per route and per intent, why requests that fit the
        document were refused (`refused_though_valid`), and the first 20 `problems`.
    """
    import requests
    import schemathesis

    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    card = requests.get(f"{base_url}/v1/models", headers=headers, timeout=_SECONDS).json()["data"][0]
    schema = schemathesis.openapi.from_url(f"{base_url}/openapi.json", headers=headers)
    schema.config.max_stream_events = _MOST_EVENTS
    operations = [result.ok() for result in schema.get_all_operations()]
    num_posts = sum(operation.method.upper() == "POST" for operation in operations)
    report = _Report()
    for operation in operations:
        is_post = operation.method.upper() == "POST"
        for mode in schemathesis.GenerationMode:
            if is_post or mode is schemathesis.GenerationMode.POSITIVE:
                count = num_cases // (2 * num_posts) if is_post else 5
                _run(operation, mode, count, {"base_url": base_url, "headers": headers}, card["vocab_size"], report)
    return report.as_dict()


def _run(operation: Any, mode: Any, count: int, where: dict[str, Any], vocab: int, report: _Report) -> None:
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode), choice=st.integers(0, 15))
    def one(case: Any, choice: int) -> None:
        if isinstance(case.body, dict):
            _tame(case.body)
            if mode.value == "positive" and choice % 8 != 7:
                case.body = _whole(case.body)
                _mend(case.body, choice, vocab)
                if (name := _LIMITS.get(operation.path)) and case.body.get(name) is None:
                    case.body[name] = _MOST_TOKENS
        answer, problem = _send(case, where)
        report.add(case, mode.value, answer, problem)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one()


def _send(case: Any, where: dict[str, Any]) -> tuple[Any, str | None]:
    """The answer, and what is wrong with it. One that is late gets a second chance: the machine may have paused."""
    import requests

    for attempt in range(2):
        try:
            answer = case.call(**where, timeout=_SECONDS)
            return answer, _problem(case, answer)
        except requests.exceptions.RequestException as error:
            if attempt:
                return None, f"no answer: {type(error).__name__} {str(error)[:200]}"
    raise AssertionError("unreachable")


class _Report:
    """Counts answers."""

    def __init__(self) -> None:
        self._statuses: Counter[str] = Counter()
        self._routes: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._intents: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._refused: Counter[str] = Counter()
        self._problems: list[str] = []

    def add(self, case: Any, intent: str, answer: Any, problem: str | None) -> None:
        status = str(answer.status_code) if answer is not None else "none"
        self._statuses[status] += 1
        self._routes[f"{case.method} {case.operation.path}"][status] += 1
        self._intents[intent][status] += 1
        if problem is not None:
            self._problems.append(f"{case.method} {case.path}: {problem}; sent {str(case.body)[:500]}")
        elif intent == "positive" and answer.status_code >= 400:
            self._refused[f"{case.operation.path}: {answer.json()['error']['message'][:120]}"] += 1

    def as_dict(self) -> dict[str, Any]:
        total = self._statuses.total()
        return {
            "cases": total,
            "accepted": round(self._statuses["200"] / total, 3),
            "statuses": dict(self._statuses),
            "routes": {route: dict(counts) for route, counts in sorted(self._routes.items())},
            "intents": {intent: dict(counts) for intent, counts in self._intents.items()},
            "refused_though_valid": dict(self._refused.most_common(20)),
            "problems": self._problems[:20],
        }


def _tame(body: dict[str, Any]) -> None:
    """Keep answers short and few: this is about requests."""
    limits = dict.fromkeys(("max_tokens", "max_completion_tokens", "max_output_tokens"), _MOST_TOKENS)
    for name, limit in (limits | {"n": _MOST_COMPLETIONS}).items():
        value = body.get(name)
        if isinstance(value, int | float) and value > limit:
            body[name] = type(value)(limit)


def _whole(value: Any) -> Any:
    """JSON schema takes 3.0 for a token id; the server does not."""
    if isinstance(value, dict):
        return {key: _whole(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _mend(body: dict[str, Any], choice: int, vocab: int) -> None:
    """Make valid what JSON schema cannot say."""
    limit = body.get("max_tokens") or body.get("max_completion_tokens") or _MOST_TOKENS
    if isinstance(body.get("min_tokens"), int) and isinstance(limit, int):
        body["min_tokens"] = min(body["min_tokens"], limit)
    if body.get("best_of"):
        body["best_of"] = body.get("n") or 1
    if bias := _dict(body.get("logit_bias")):
        body["logit_bias"] = {str(int(token) % vocab): value for token, value in bias.items()}
    for message in map(_dict, _list(body.get("messages"))):
        if message.get("tool_calls") and message.get("content") is None:
            message["content"] = ""  # what many templates insist on
    for holder, name in _places(body):
        if name == "grammar":
            holder[name] = _GRAMMARS[choice % len(_GRAMMARS)]
        elif name == "regex":
            holder[name] = _REGEXES[choice % len(_REGEXES)]
        elif name == "arguments":
            holder[name] = '{"a": 1}'
        else:
            holder[name] = _SCHEMAS[choice % len(_SCHEMAS)]
    chosen, functions = _dict(body.get("tool_choice")), _functions(body)
    if chosen and functions:
        name = {"name": functions[-1]["name"]}
        if "allowed_tools" in chosen:
            chosen["allowed_tools"] = {"mode": "auto", "tools": [{"type": "function", "function": name}]}
        else:
            chosen |= name if "function" not in chosen else {"function": name}


def _places(body: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Where a schema, a regex, a grammar or the text of an object stands."""
    form = _dict(body.get("structured_outputs"))
    yield from ((form, name) for name in ("json", "regex", "grammar") if form.get(name) is not None)
    wanted = _dict(_dict(body.get("response_format")).get("json_schema"))
    shaped = _dict(_dict(body.get("text")).get("format"))
    yield from ((holder, "schema") for holder in (wanted, shaped) if holder.get("schema") is not None)
    for name in ("parameters", "input_schema"):
        yield from ((function, name) for function in _functions(body) if function.get(name) is not None)
    calls = [_dict(call) for message in _list(body.get("messages")) for call in _list(_dict(message).get("tool_calls"))]
    yield from ((_dict(call.get("function")), "arguments") for call in calls)


def _functions(body: dict[str, Any]) -> list[dict[str, Any]]:
    tools = [_dict(tool) for tool in _list(body.get("tools"))]
    functions = [_dict(tool.get("function")) or tool for tool in tools]
    return [function for function in functions if "name" in function]


def _dict(value: Any) -> dict[str, Any]:
    """Fields a route does not know may hold anything."""
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _problem(case: Any, answer: Any) -> str | None:
    from schemathesis.specs.openapi import checks

    if answer.status_code == 503 and "retry-after" in answer.headers:
        return None
    if answer.status_code >= 500 or answer.status_code == 422:
        return f"status {answer.status_code}: {answer.text[:300]}"
    if "text/event-stream" in answer.headers.get("content-type", [""])[0]:
        return _stream_problem(answer.text)
    wanted = [checks.status_code_conformance, checks.content_type_conformance, checks.response_schema_conformance]
    try:
        case.validate_response(answer, checks=wanted)
    except BaseExceptionGroup as group:
        return f"status {answer.status_code}, {' '.join(str(group.exceptions[0]).split())[:400]}"
    except AssertionError as error:
        return f"status {answer.status_code}, {' '.join(str(error).split())[:400]}"
    return None


def _stream_problem(text: str) -> str | None:
    """Events of JSON that end as they must; responses and messages name their events and have no [DONE]."""
    events = [event.split("\n") for event in text.split("\n\n")]
    if events.pop() != [""]:
        return f"a stream without a last newline: {text[-300:]}"
    if any(event[0] == "event: error" for event in events):
        return f"an error in a stream: {text[-300:]}"
    data = [event[-1].removeprefix("data: ") for event in events]
    named = events[-1][0] in _LAST_EVENTS
    if not named and data.pop() != "[DONE]":
        return f"a stream without an end: {text[-300:]}"
    try:
        [json.loads(one) for one in data]
    except ValueError:
        return f"a stream with an event that is no JSON: {text[:300]}"
    return None


if __name__ == "__main__":
    sys.exit(main())
