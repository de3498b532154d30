"""What a run says: a line a step, a bar on a terminal, JSONL for machines, a picture of the losses at the end."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any, TextIO

LOG = "log.jsonl"
PLOT = "loss.png"


class Journal:
    """The log of one run.

    Args:
        folder: where `log.jsonl` is; a resumed run goes on in it, without what came after its checkpoint.
        first: the step that it begins after.
        steps: in the whole run.
        quiet: say nothing (the other processes of several).
    """

    def __init__(self, folder: Path, first: int, steps: int, *, tensorboard: bool = False, quiet: bool = False):
        self._quiet, self._folder, self._file = quiet, folder, None
        self.entries: list[dict[str, Any]] = _entries_before(folder / LOG, first)
        self._events: Any = _events(folder) if tensorboard and not quiet else None
        self._bar: Any = None
        if quiet:
            return
        self._file: TextIO | None = (folder / LOG).open("w", encoding="utf-8")
        for entry in self.entries:
            self._write(entry)
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=steps, initial=first, desc="jaxllm: training", unit="step", file=sys.stderr)

    def step(self, entry: dict[str, Any]) -> None:
        """One optimiser step."""
        self.add(entry)
        if self._bar is not None:
            self._bar.update(entry["step"] - self._bar.n)
            self._bar.set_postfix_str(_short(entry))
        else:
            self.say(f"step {entry['step']}: {_short(entry)}")

    def add(self, entry: dict[str, Any]) -> None:
        """An entry of the log."""
        self.entries.append(entry)
        if self._quiet:
            return
        self._write(entry)
        if self._events is not None:
            for name, value in entry.items():
                if isinstance(value, float):
                    self._events.add_scalar(name, value, entry["step"])

    def say(self, text: str) -> None:
        """A line for people."""
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.write(f"jaxllm: {text}", file=sys.stderr)
        else:
            print(f"jaxllm: {text}", file=sys.stderr, flush=True)

    def close(self, *, plot: bool) -> None:
        """End the files, and draw."""
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.close()
        if self._events is not None:
            self._events.close()
        assert self._file is not None
        self._file.close()
        if plot:
            self._draw()

    def _write(self, entry: dict[str, Any]) -> None:
        assert self._file is not None
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()

    def _draw(self) -> None:
        try:
            from matplotlib.figure import Figure
        except ImportError:
            self.say('no loss.png: pip install "jaxllm[plot]", or say --no-plot')
            return
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot()
        for name, label in (("loss", "training"), ("eval_loss", "held out")):
            points = [(entry["step"], entry[name]) for entry in self.entries if name in entry]
            if points:
                axes.plot(*zip(*points, strict=True), label=label, linewidth=1 if name == "loss" else 2)
        axes.set_xlabel("step")
        axes.set_ylabel("loss (nats per token)")
        if axes.lines:
            axes.legend()
        figure.savefig(self._folder / PLOT, dpi=120)


def _short(entry: dict[str, Any]) -> str:
    mfu = f", MFU {entry['mfu']:.1%}" if entry.get("mfu") is not None else ""
    return (
        f"loss {entry['loss']:.4f}, lr {entry['learning_rate']:.2e}, grad norm {entry['grad_norm']:.2f}, "
        f"{entry['tokens_per_s']:.0f} tokens/s{mfu}"
    )


def _entries_before(file: Path, first: int) -> list[dict[str, Any]]:
    """What a run has logged up to the step it resumes at; a line that a killed run left half is left out."""
    entries = []
    if first and file.is_file():
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if entry["step"] <= first:
                entries.append(entry)
    return entries


def _events(folder: Path) -> Any:
    try:
        from tensorboardX import SummaryWriter  # type: ignore[import-not-found]
    except ImportError:
        raise ValueError("tensorboard needs the package tensorboardX: pip install tensorboardX") from None
    return SummaryWriter(str(folder / "tensorboard"))


def is_finite(value: float) -> bool:
    """Whether a loss is a number."""
    return math.isfinite(value)
