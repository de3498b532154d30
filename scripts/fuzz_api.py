"""Fuzz a running server with what its own OpenAPI document allows, and with what it forbids (Schemathesis).

    python scripts/fuzz_api.py --base-url http://127.0.0.1:8000 --api-key k --cases 2000

No answer may be a 5xx or late, and every error must have the documented shape. Exit code 1 otherwise.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections import Counter
from typing import Any


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
    """Send about `num_cases` requests, spread over operations, half of them meant to be wrong."""
    import schemathesis
    from hypothesis import HealthCheck, given, settings

    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    schema = schemathesis.openapi.from_url(f"{base_url}/openapi.json", headers=headers)
    operations = [result.ok() for result in schema.get_all_operations()]
    with_input = [operation for operation in operations if operation.method.upper() == "POST"]
    share = num_cases // (2 * len(with_input))
    statuses: Counter[str] = Counter()
    problems: list[str] = []
    for operation in operations:
        for mode in schemathesis.GenerationMode:
            if mode is schemathesis.GenerationMode.NEGATIVE and operation not in with_input:
                continue
            count = share if operation in with_input else 5

            @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
            @given(case=operation.as_strategy(mode))
            def one(case: Any) -> None:
                _tame(case)
                answer = case.call(base_url=base_url, headers=headers, timeout=30)
                statuses[str(answer.status_code)] += 1
                problem = _problem(answer)
                if problem is not None:
                    problems.append(f"{case.method} {case.path}: {problem}")

            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                one()
    return {"cases": statuses.total(), "statuses": dict(statuses), "problems": problems[:20]}


def _tame(case: Any) -> None:
    """Keep answers short: this is about requests."""
    if isinstance(case.body, dict):
        for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
            value = case.body.get(name)
            if isinstance(value, int) and value > 4:
                case.body[name] = 4


def _problem(answer: Any) -> str | None:
    if answer.status_code >= 500 or answer.status_code == 422:
        return f"status {answer.status_code}: {answer.text[:300]}"
    if answer.status_code >= 400:
        try:
            error = answer.json()["error"]
            assert set(answer.json()) == {"error"} and set(error) == {"message", "type", "param", "code"}
        except (ValueError, KeyError, TypeError, AssertionError):
            return f"an error in another shape: {answer.text[:300]}"
    return None


if __name__ == "__main__":
    sys.exit(main())
