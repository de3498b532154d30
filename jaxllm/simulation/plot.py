"""A simulation's report -> one PNG: a sweep over rates, or a search over deployments. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxllm.roofline.plot import check_plotting


def check_plot(path: Path) -> None:
    """Raise ValueError where nothing could be drawn there."""
    check_plotting()
    if path.suffix != ".png":
        raise ValueError(f"--plot is {path}; it must end in .png")
    if not path.parent.is_dir():
        raise ValueError(f"--plot is {path}; there is no folder {path.parent}")


def save_plot(report: dict[str, Any], path: Path) -> None:
    """Draw what the report has most of."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), dpi=120, layout="constrained")
    if "search" in report:
        _search(figure, report)
    elif "sweep" in report:
        _sweep(figure, report)
    else:
        _latencies(figure, report)
    figure.savefig(path)


def _sweep(figure: Any, report: dict[str, Any]) -> None:
    """Attainment, and latencies, over the rate."""
    points = report["sweep"]
    rates = [point["request_rate"] for point in points]
    left, right = figure.subplots(1, 2)
    left.plot(rates, [100 * point["slo_attainment"] for point in points], marker="o")
    left.set(
        title=f"{report['model']} on {report['num_devices']} x {report['chip']}",
        xlabel="requests/s",
        ylabel="requests within the SLO, %",
        ylim=(0, 102),
    )
    if report["highest_rate"] is not None:
        left.axvline(report["highest_rate"], color="grey", linestyle=":")
    for metric, color in (("ttft", "tab:blue"), ("itl", "tab:orange")):
        for name, style in (("p50", "--"), ("p99", "-")):
            values = [point[f"{metric}_ms"][name] for point in points]
            right.plot(rates, values, style, marker=".", color=color, label=f"{metric.upper()} {name}")
        if (limit := report["slo"].get(metric)) is not None:
            right.axhline(limit, color=color, linestyle=":")
    right.set(title="latency", xlabel="requests/s", ylabel="ms", yscale="log")
    right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)


def _latencies(figure: Any, report: dict[str, Any]) -> None:
    """Percentiles of one run."""
    metrics = ("ttft", "tpot", "itl", "e2e")
    for axes, metric in zip(figure.subplots(1, len(metrics)), metrics, strict=True):
        values = {name: value or 0.0 for name, value in report[f"{metric}_ms"].items()}
        axes.bar(list(values), list(values.values()))
        if (limit := report["slo"].get(metric)) is not None:
            axes.axhline(limit, color="tab:red", linestyle=":", label="SLO")
            axes.legend()
        axes.set(title=metric.upper(), ylabel="ms")


def _search(figure: Any, report: dict[str, Any], limit: int = 16) -> None:
    """The best deployments, split into pools or not."""
    from jaxllm.simulation.search import name_of

    rows = report["search"][:limit][::-1]
    axes = figure.add_subplot()
    colors = ["tab:blue" if "mesh" in row else "tab:orange" for row in rows]
    bars = axes.barh([name_of(row) for row in rows], [row["goodput_per_device"] for row in rows], color=colors)
    for bar, row in zip(bars, rows, strict=True):
        bar.set_alpha(0.35 if row.get("at_most") else 1.0)
    slo = ", ".join(f"{name} {limit:g} ms" for name, limit in report["slo"].items())
    axes.set(
        title=f"{report['model']} on {report['num_devices']} x {report['chip']}: {slo}",
        xlabel="requests/s per device within the SLO (orange: prefill and decode apart; pale: below this)",
    )
    axes.grid(alpha=0.3, axis="x")
