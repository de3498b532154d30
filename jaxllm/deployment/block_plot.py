"""The table of one block -> one PNG: a row per step, a column per device, the part that it holds filled.

Needs matplotlib (the extra `plot`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

_MAX_DEVICES = 8
_COLOURS = {"whole": "tab:blue", "part": "tab:orange"}


def check_plotting() -> None:
    """Raise ValueError with what to install where matplotlib is missing."""
    from jaxllm.roofline.plot import check_plotting as check

    check()


def save_plot(counts: dict[str, Any], path: Path) -> None:
    """Draw what `count_collectives` returned; tokens (or experts) run downwards, features to the right."""
    check_plotting()
    from matplotlib.figure import Figure

    steps = [step for step in counts["block"] if step["devices"]]
    num_columns = min(_MAX_DEVICES, len(steps[0]["devices"]))
    figure = Figure(figsize=(3.6 + 1.5 * num_columns, 1.2 + 1.15 * len(steps)), dpi=120, layout="constrained")
    grid = figure.subplots(len(steps), num_columns, squeeze=False)
    for step, row in zip(steps, grid, strict=True):
        for device, axes in zip(step["devices"], row, strict=False):
            _draw(axes, step, device)
        letters = " x ".join(map(str, step["shape"]))
        row[0].set_ylabel(f"{step['step']}\n{letters}", rotation=0, ha="right", va="center", fontsize=9)
        if sent := ", ".join(c["kind"] for c in step["collectives"]):
            row[-1].annotate(
                f"after {sent}", (1.06, 0.5), xycoords="axes fraction", va="center", fontsize=9, color="tab:red"
            )
    for device, axes in zip(steps[0]["devices"], grid[0], strict=False):
        axes.set_title(",".join(f"{axis}={at}" for axis, at in device["mesh"].items()), fontsize=9)
    mesh = ",".join(f"{axis}={size}" for axis, size in counts["mesh"].items())
    total = len(steps[0]["devices"])
    more = f" (first {num_columns} of {total} devices)" if total > num_columns else ""
    name = Path(counts["model"]).name
    figure.suptitle(f"{name}, mesh {mesh}, rules {Path(counts['sharding_rules']).stem}{more}", fontsize=11)
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise ValueError(f"cannot write --plot {path}: {error.strerror}") from None


def _draw(axes: Any, step: dict[str, Any], device: dict[str, Any]) -> None:
    """The outline of the whole array, and the box that this device holds: first dim downwards, first cut one across."""
    from matplotlib.patches import Rectangle

    parts = [(start / size, stop / size) for (start, stop), size in zip(device["slices"], step["shape"], strict=True)]
    top, bottom = parts[0]
    left, right = next((part for part in parts[1:] if part != (0.0, 1.0)), (0.0, 1.0))
    is_whole = all(part == (0.0, 1.0) for part in parts)
    axes.add_patch(Rectangle((left, top), right - left, bottom - top, color=_COLOURS["whole" if is_whole else "part"]))
    box = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1.5}
    axes.text(0.5, 0.86, " x ".join(map(str, device["shape"])), ha="center", va="center", fontsize=8, bbox=box)
    axes.set(xlim=(0, 1), ylim=(1, 0), xticks=[], yticks=[])
