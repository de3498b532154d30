"""Uploaded files and the batches that run over them. In memory, bounded, gone with the process."""

from __future__ import annotations

import asyncio
import time
import uuid
from dataclasses import dataclass, field
from typing import Any, final

from jaxllm.server.batch import answers
from jaxllm.server.errors import ApiError

_MAX_BYTES = 256 << 20
_MAX_FILES = 1000
_ENDED = ("completed", "failed", "cancelled")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    """A file and what clients are told of it."""

    content: bytes
    filename: str
    purpose: str
    id: str = field(default_factory=lambda: f"file-{uuid.uuid4().hex[:24]}")
    created_at: int = field(default_factory=lambda: int(time.time()))

    def shaped(self) -> dict[str, Any]:
        """As OpenAI writes it."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": len(self.content),
            "created_at": self.created_at,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
        }


@final
class FileStore:
    """Files by id."""

    def __init__(self) -> None:
        self._files: dict[str, StoredFile] = {}

    def add(self, file: StoredFile) -> StoredFile:
        """Keep one. Raises ApiError where there is no room."""
        size = sum(len(kept.content) for kept in self._files.values())
        if size + len(file.content) > _MAX_BYTES or len(self._files) >= _MAX_FILES:
            raise ApiError(413, f"files take {size} of {_MAX_BYTES} bytes; delete some with DELETE /v1/files/ID")
        self._files[file.id] = file
        return file

    def get(self, file_id: str) -> StoredFile:
        """Raises ApiError where there is none."""
        if file_id not in self._files:
            raise ApiError(404, f"there is no file {file_id[:100]!r}; upload it with POST /v1/files")
        return self._files[file_id]

    def remove(self, file_id: str) -> None:
        """Forget one. Raises ApiError where there is none."""
        self.get(file_id)
        del self._files[file_id]

    def all(self) -> list[StoredFile]:
        """The newest first."""
        return list(reversed(self._files.values()))


@final
class Batch:
    """One batch: its state as clients see it, and the task that works on it."""

    def __init__(self, endpoint: str, input_file: StoredFile, window: str, metadata: dict[str, Any] | None):
        self.id = f"batch_{uuid.uuid4().hex[:24]}"
        self._times: dict[str, int] = {"created_at": int(time.time())}
        self._status = "validating"
        self._endpoint, self._input, self._window, self._metadata = endpoint, input_file, window, metadata
        self._lines = [line for line in input_file.content.decode("utf-8", "replace").split("\n") if line.strip()]
        self._counts = {"total": len(self._lines), "completed": 0, "failed": 0}
        self._outputs: dict[str, str] = {}
        self._task: asyncio.Task[None] | None = None

    def start(self, app: Any, files: FileStore, most: int) -> None:
        """Begin; on the event loop that serves."""
        self._task = asyncio.ensure_future(self._run(app, files, most))

    async def _run(self, app: Any, files: FileStore, most: int) -> None:
        self._to("in_progress")
        good, bad = [], []
        try:
            async for line in answers(app, self._lines, most=most, endpoint=self._endpoint):
                failed = '"error": null' not in line[-20:]
                (bad if failed else good).append(line)
                self._counts["failed" if failed else "completed"] += 1
            status = "completed"
        except asyncio.CancelledError:
            status = "cancelled"
        for name, lines in (("output_file_id", good), ("error_file_id", bad)):
            if lines:
                content = "".join(line + "\n" for line in lines).encode()
                file = StoredFile(content=content, filename=f"{self.id}_{name[:6]}.jsonl", purpose="batch_output")
                try:
                    self._outputs[name] = files.add(file).id
                except ApiError:
                    status = "failed"
        self._to(status)

    def _to(self, status: str) -> None:
        self._status = status
        self._times[f"{status}_at"] = int(time.time())

    def cancel(self) -> None:
        """End it; what is answered stays."""
        if self._status not in _ENDED and self._task is not None:
            self._status = "cancelling"
            self._task.cancel()

    def shaped(self) -> dict[str, Any]:
        """As OpenAI writes it."""
        return {
            "id": self.id,
            "object": "batch",
            "endpoint": self._endpoint,
            "errors": None,
            "input_file_id": self._input.id,
            "completion_window": self._window,
            "status": self._status,
            "output_file_id": self._outputs.get("output_file_id"),
            "error_file_id": self._outputs.get("error_file_id"),
            "request_counts": dict(self._counts),
            "metadata": self._metadata,
            **self._times,
        }
