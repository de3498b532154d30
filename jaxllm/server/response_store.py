"""Answers of the responses API that later requests may go on from. In memory, bounded, gone with the process."""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, final

from jaxllm.server.errors import ApiError

_MAX_RESPONSES = 1000
_MAX_CHARS = 64 << 20


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """What was answered, and the whole conversation up to it."""

    answer: dict[str, Any]
    messages: list[dict[str, Any]]


@final
class ResponseStore:
    """The last answers; the oldest are forgotten first."""

    def __init__(self) -> None:
        self.items: dict[str, dict[str, Any]] = {}
        self._responses: OrderedDict[str, tuple[StoredResponse, int]] = OrderedDict()
        self._num_chars = 0

    def add(self, response_id: str, stored: StoredResponse) -> None:
        """Keep one."""
        if response_id in self._responses:
            self.remove(response_id)
        size = len(json.dumps(stored.messages)) + len(json.dumps(stored.answer))
        self._responses[response_id] = (stored, size)
        self._num_chars += size
        self.items |= {item["id"]: item for item in stored.answer["output"]}
        while len(self._responses) > _MAX_RESPONSES or self._num_chars > _MAX_CHARS:
            self.remove(next(iter(self._responses)))

    def get(self, response_id: str) -> StoredResponse:
        """Raises ApiError where it is not kept (any more)."""
        if response_id not in self._responses:
            raise _missing(response_id)
        return self._responses[response_id][0]

    def remove(self, response_id: str) -> None:
        """Forget one. Raises ApiError where it is not kept."""
        if response_id not in self._responses:
            raise _missing(response_id)
        stored, size = self._responses.pop(response_id)
        self._num_chars -= size
        for item in stored.answer["output"]:
            self.items.pop(item["id"], None)


def _missing(response_id: str) -> ApiError:
    return ApiError(
        404,
        f"response {response_id[:100]!r} is not stored here (any more); send the whole conversation",
        param="previous_response_id",
        code="response_not_found",
    )
