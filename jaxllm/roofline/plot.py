"""The points of a roofline report -> one PNG: attainable FLOP/s over FLOPs per byte, both logarithmic.

Needs matplotlib (the extra `plot`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

_MARKS = {"decode": ("o", "tab:blue"), "prefill": ("s", "tab:orange")}


def check_plotting() -> None:
    """Raise ValueError with what to install where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError('--plot needs matplotlib; pip install "jaxllm[plot]", or leave --plot out') from None


def save_plot(report: dict[str, Any], path: Path) -> None:
    """Draw the two roofs, the ridge and every point; filled marks are the linear model, hollow with attention."""
    check_plotting()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    peak, bandwidth, ridge = report["peak_flops"], report["peak_bytes_per_s"], report["ridge"]
    every = [figures["intensity"] for p in report["points"] for figures in (p, p["with_attention"])]
    low, high = min(*every, ridge) / 3, max(*every, ridge) * 4
    axes.plot([low, ridge, high], [low * bandwidth, peak, peak], color="black", linewidth=1.5)
    axes.plot(ridge, peak, marker="D", color="black", linestyle="none", label=f"ridge {ridge:.0f} FLOP/byte")
    axes.axvline(ridge, color="grey", linestyle=":", linewidth=1)
    for phase in _MARKS:
        _draw_phase(axes, report, phase)
    axes.set(
        xscale="log",
        yscale="log",
        xlim=(low, high),
        ylim=(low * bandwidth, peak * 3),
        xlabel="FLOPs per byte of memory traffic",
        ylabel="attainable FLOP/s",
        title=f"{report['model']} on {report['num_chips']} x {report['chip']}",
    )
    axes.grid(which="both", alpha=0.2)
    axes.legend(loc="lower right")
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise ValueError(f"cannot write --plot {path}: {error.strerror}") from None


def _draw_phase(axes: Any, report: dict[str, Any], phase: str) -> None:
    points = [p for p in report["points"] if p["phase"] == phase]
    if not points:
        return
    mark, colour = _MARKS[phase]
    peak, bandwidth = report["peak_flops"], report["peak_bytes_per_s"]

    def roof(intensities: list[float]) -> list[float]:
        return [min(peak, i * bandwidth) for i in intensities]

    linear = [p["intensity"] for p in points]
    full = [p["with_attention"]["intensity"] for p in points]
    what = f"decode, batch {points[0]['batch']}" if phase == "decode" else f"prefill, chunk {points[0]['chunk']}"
    axes.plot(full, roof(full), mark, color=colour, fillstyle="none", markersize=11, label=f"{what}, with attention")
    axes.plot(linear, roof(linear), mark, color=colour, markersize=6, label=what)
    below = phase == "decode"
    for point, x, y in zip(points, linear, roof(linear), strict=True):
        style = {"rotation": -45, "va": "top"} if below else {"rotation": 45, "va": "bottom"}
        offset = (4, -4) if below else (-2, 7)
        axes.annotate(_short(point["context"]), (x, y), offset, textcoords="offset points", color=colour, **style)


def _short(tokens: int) -> str:
    for unit, size in (("M", 1 << 20), ("k", 1 << 10)):
        if tokens >= size and tokens % size == 0:
            return f"{tokens // size}{unit}"
    return str(tokens)
