"""`jaxllm bench replay`: traces without a model; and what `bench prefix` refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jaxllm.cli import main


def write_trace(path: Path, rows: list[tuple[int, int, list[int]]]) -> Path:
    lines = [
        json.dumps({"timestamp": i, "input_length": a, "output_length": b, "hash_ids": ids})
        for i, (a, b, ids) in enumerate(rows)
    ]
    path.write_text("\n".join(lines))
    return path


def test_a_replay_counts_what_was_shared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [(1100, 4, [1, 2, 3]), (1024, 2, [1, 2]), (600, 8, [9, 2])]
    path = write_trace(tmp_path / "t.jsonl", rows)
    assert main(["bench", "replay", "--trace", str(path), "--num-pages", "100", "--max-num-seqs", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["prefix_cache_queries"] == 1100 + 1024 + 600
    assert report["prefix_cache_hits"] == 512, "one of the second's two blocks: a token must be left to compute"
    assert report["computed_tokens"] == 1100 + 512 + 600 + 3 + 1 + 7
    assert 0.5 < report["slot_utilization"] < 1
    assert main(["bench", "replay", "--trace", str(path), "--num-requests", "2"]) == 0
    assert "2 requests" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["replay", "--trace", "{}", "--num-pages", "2"], "raise kv_cache_memory_bytes"),
        (["replay", "--trace", "{}", "--page-size", "0"], "--page-size is 0; it must be at least 1"),
        (["prefix"], "set --host-kv-bytes"),
        (["prefix", "--host-kv-bytes", "1", "--from-disk"], "set --disk-kv-path"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_trace(tmp_path / "t.jsonl", [(1100, 4, [1, 2, 3])])
    assert main(["bench", *(a.format(path) for a in arguments)]) == 1
    assert words in capsys.readouterr().err
