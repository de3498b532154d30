"""`jaxllm roofline`: the JSON object, the table, the picture, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from jaxllm.cli import main

ARGS = ["roofline", "--model", "llama-2-7b", "--chip", "h100"]


def report(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, Any]:
    assert main([*ARGS, *args, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_json_has_the_promised_shape(capsys: pytest.CaptureFixture[str]) -> None:
    got = report(capsys, "--batch", "32", "--context", "1024,4k", "--chunk", "512")
    assert got["chip"] == "h100"
    assert got["ridge"] == pytest.approx(990 / 3.35)
    keys = {"phase", "batch", "context", "flops", "bytes", "intensity", "bound", "time_ms"}
    assert all(keys <= set(point) for point in got["points"])
    order = [(p["phase"], p["batch"], p["context"], p["chunk"]) for p in got["points"]]
    assert order == [
        ("decode", 32, 1024, 1),
        ("decode", 32, 4096, 1),
        ("prefill", 1, 1024, 512),
        ("prefill", 1, 4096, 512),
    ]
    first = got["points"][0]
    assert first["intensity"] == pytest.approx(first["flops"] / first["bytes"])
    assert first["time_ms"] == pytest.approx(1e3 * first["bytes"] / 3.35e12)
    assert first["with_attention"]["flops"] > first["flops"] * 0.98


def test_attention_makes_long_prefill_compute_bound(capsys: pytest.CaptureFixture[str]) -> None:
    point = report(capsys, "--context", "1m")["points"][1]
    assert (point["bound"], point["with_attention"]["bound"]) == ("memory", "compute")
    assert point["with_attention"]["time_ms"] > 5 * point["time_ms"]


def test_chips_together_are_faster_and_hold_copies_of_few_heads(capsys: pytest.CaptureFixture[str]) -> None:
    one, two = report(capsys, "--context", "4k"), report(capsys, "--context", "4k", "--mesh", "tp=2")
    assert two["points"][0]["time_ms"] == pytest.approx(one["points"][0]["time_ms"] / 2)
    assert (one["points"][0]["fits"], two["points"][0]["fits"]) == (False, True)
    assert one["points"][0]["collectives_ms"] == 0
    prefill = two["points"][1]
    assert prefill["collectives_ms"] == pytest.approx(1e3 * 2 * 32 * 2 * (2048 * 4096 * 2) / (2 * 450e9))


def test_table_for_a_person(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ARGS, "--context", "4096", "--mesh", "tp=2"]) == 0
    out = capsys.readouterr().out
    assert "2 x NVIDIA H100 SXM: 1,980 TFLOP/s, 6.7 TB/s, ridge at 296 FLOP/byte" in out
    assert "beyond 25,705 tokens" in out
    assert [line.split()[0] for line in out.splitlines() if line.startswith(("decode", "prefill"))] == [
        "decode",
        "prefill",
    ]


def test_a_checkpoint_is_a_model_too(capsys: pytest.CaptureFixture[str], tiny_llama: Path) -> None:
    assert main(["roofline", "--model", str(tiny_llama), "--chip", "cpu", "--json"]) == 0
    got = json.loads(capsys.readouterr().out)
    assert got["chip"] == "cpu"
    assert got["num_parameters"] < 1e6


def test_plot_is_a_png_with_every_point(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.axes import Axes

    drawn: dict[str, list[tuple[float, float]]] = {}
    plot = Axes.plot

    def spy(self: Axes, x: Any, y: Any, *args: Any, **kwargs: Any) -> Any:
        if label := kwargs.get("label"):
            drawn[label] = list(zip(x, y, strict=True)) if isinstance(x, list) else [(x, y)]
        return plot(self, x, y, *args, **kwargs)

    monkeypatch.setattr(Axes, "plot", spy)
    path = tmp_path / "roofline.png"
    got = report(capsys, "--context", "1k,64k", "--plot", str(path))
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert int.from_bytes(data[16:20], "big") > 600
    assert drawn["ridge 296 FLOP/byte"] == [(got["ridge"], 990e12)]
    for label, phase in (("decode, batch 32", "decode"), ("prefill, chunk 2048", "prefill")):
        points = [p for p in got["points"] if p["phase"] == phase]
        assert drawn[label] == [(p["intensity"], min(990e12, p["intensity"] * 3.35e12)) for p in points]
        assert [x for x, _ in drawn[f"{label}, with attention"]] == [p["with_attention"]["intensity"] for p in points]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--chip", "h300"], "no chip 'h300'"),
        (["--context", "1k,many"], "--context '1k,many' is not understood at 'many'"),
        (["--context", "0"], "not understood"),
        (["--batch", "0"], "--batch is 0; it must be at least 1"),
        (["--mesh", "tp=3"], "use tp=1, 2, 4, 8, 16 or 32"),
        (["--mesh", "dp=2,tp=4"], "give --batch per replica"),
        (["--plot", "/no/such/folder/x.png"], "cannot write --plot"),
    ],
)
def test_what_cannot_be_done_is_one_line(capsys: pytest.CaptureFixture[str], args: list[str], message: str) -> None:
    assert main([*ARGS, *args]) == 1
    streams = capsys.readouterr()
    assert message in streams.err
    assert streams.err.count("\n") == 1
    assert not streams.out


def test_without_matplotlib_one_line_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([*ARGS, "--plot", str(tmp_path / "x.png")]) == 1
    assert 'pip install "jaxllm[plot]"' in capsys.readouterr().err
