"""An engine in a process of its own, for scripts that measure several in turn: a line of work in, its seconds out."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

SETTINGS = {"VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1"}


class PeerProcess:
    """Started by `command`; reads work as lines of JSON, and answers each with a line `seconds S`."""

    def __init__(self, name: str, command: Sequence[str], settings: Mapping[str, str] | None = None):
        self.name = name
        env = os.environ | SETTINGS | dict(settings or {})
        self.child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, text=True)

    def __enter__(self) -> PeerProcess:
        return self

    def __exit__(self, *exc: object) -> None:
        assert self.child.stdin is not None
        self.child.stdin.close()
        try:
            self.child.wait(60)
        except subprocess.TimeoutExpired:
            self.child.kill()

    def run(self, work: Any) -> float:
        """Seconds of one piece of work."""
        assert self.child.stdin is not None and self.child.stdout is not None
        print(json.dumps(work), file=self.child.stdin, flush=True)
        for line in self.child.stdout:
            if line.startswith("seconds "):  # engines print other things too
                return float(line.split()[1])
        raise SystemExit(f"{self.name} ended with exit code {self.child.wait()}")
