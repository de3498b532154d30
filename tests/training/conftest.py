"""Small data and small runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SENTENCES = (
    "the cat sat on the mat. ",
    "a dog ran to the cat. ",
    "the mat is on the floor. ",
    "who ran? the dog ran. ",
)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain text of some thousand characters."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("".join(SENTENCES[i * i % 7 % 4] + "\n" * (i % 5 == 0) for i in range(200)), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def instructions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve instructions in a JSON list."""
    file = tmp_path_factory.mktemp("instructions") / "data.json"
    entries = [
        {"instruction": f"Say {i}.", "input": "" if i % 2 else "now", "output": f"{i} " * (i % 4 + 1)}
        for i in range(12)
    ]
    file.write_text(json.dumps(entries), encoding="utf-8")
    return file


def train_small(folder: Path, **fields: Any) -> dict[str, Any]:
    """Train a two-layer model from scratch; its report, and what it logged."""
    from jaxllm.training.config import TrainConfig
    from jaxllm.training.run import train

    settings: dict[str, Any] = {
        "output": str(folder),
        "num_layers": 2,
        "num_heads": 2,
        "hidden_size": 32,
        "context_length": 16,
        "batch_size": 8,
        "steps": 6,
        "eval_every": 3,
        "eval_batches": 2,
        "warmup_steps": 2,
        "compute_dtype": "float32",
        "plot": False,
        "sample_every": 0,
        "dtype": "float32",
    }
    report = train(TrainConfig(**settings | fields))
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return {**report, "log": [json.loads(line) for line in lines]}


@pytest.fixture
def run(text: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """`run(name, **fields)`: `train_small` into a folder of this test."""
    return lambda name, **fields: train_small(tmp_path / name, **{"data": str(text), **fields})


def losses(report: dict[str, Any]) -> list[float]:
    """Of every step."""
    return [entry["loss"] for entry in report["log"] if "loss" in entry]
