"""Records a conversation on a terminal as an SVG that plays, each piece of text at the time when it came.

    python scripts/record_chat.py docs/chat.svg "What is the capital of France?" "And of Italy?"

Runs `jaxllm chat` with the default model on a pseudo-terminal, types the questions like a person, and draws what was
shown: 80 columns, long waits cut to a second and a half.
"""

from __future__ import annotations

import argparse
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

_COLUMNS, _LONGEST_WAIT = 80, 1.5
_CELL, _LINE, _MARGIN = 8.4, 20, 18
_KEY_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Shown:
    """Text that appeared at once, in seconds since the start."""

    at: float
    text: str


def record(command: Sequence[str], questions: Sequence[str]) -> list[Shown]:
    """Run the command, ask each question when a prompt waits for it, then leave."""
    master, slave = pty.openpty()
    environment = os.environ | {"TERM": "dumb", "COLUMNS": str(_COLUMNS)}
    with subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environment, close_fds=True) as child:
        os.close(slave)
        shown = [Shown(0.0, f"$ jaxllm {' '.join(command[3:])}\n")]
        started = time.monotonic()
        for line in [*questions, "/exit"]:
            shown += _until_prompt(master, started)
            for key in f"{line}\n":
                os.write(master, key.encode())
                time.sleep(_KEY_SECONDS)
                shown += _read(master, started, seconds=0)
        child.wait(30)
    return shown


def _until_prompt(master: int, started: float, seconds: float = 600) -> Iterator[Shown]:
    """What is shown until the program waits at its prompt."""
    text, deadline = "", time.monotonic() + seconds
    while not text.endswith("> "):
        if time.monotonic() > deadline:
            raise SystemExit(f"no prompt came; the last words were {text[-200:]!r}")
        for piece in _read(master, started, seconds=0.2):
            text += piece.text
            yield piece


def _read(master: int, started: float, seconds: float) -> Iterator[Shown]:
    while select.select([master], [], [], seconds)[0]:
        try:
            data = os.read(master, 4096)
        except OSError:  # the other side is closed
            return
        if not data:
            return
        yield Shown(time.monotonic() - started, data.decode("utf-8", "replace").replace("\r\n", "\n"))
        seconds = 0


def draw(shown: Sequence[Shown]) -> str:
    """The recording as an SVG that plays once."""
    cells: list[tuple[float, int, int, str]] = []  # when, line, column, text
    line = column = 0
    now = last = 0.0
    for piece in shown:
        now += min(piece.at - last, _LONGEST_WAIT)
        last = piece.at
        for i, part in enumerate(piece.text.split("\n")):
            if i:
                line, column = line + 1, 0
            while part:
                fits, part = part[: _COLUMNS - column], part[_COLUMNS - column :]
                cells.append((now, line, column, fits))
                column += len(fits)
                if part:
                    line, column = line + 1, 0
    width, height = round(_COLUMNS * _CELL + 2 * _MARGIN), (line + 2) * _LINE + 2 * _MARGIN
    texts = [
        f'<text x="{_MARGIN + column * _CELL:.1f}" y="{_MARGIN + (row + 1) * _LINE}" visibility="hidden" '
        f'xml:space="preserve">{escape(text)}<set attributeName="visibility" to="visible" begin="{when:.2f}s"/></text>'
        for when, row, column, text in cells
        if text.strip()
    ]
    style = f"text {{ font: 14px ui-monospace, monospace; fill: #e5e7eb; letter-spacing: {_CELL - 8.4:.1f}px; }}"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
            "<title>A conversation on the terminal</title>",
            f"<style>{style}</style>",
            f'<rect width="{width}" height="{height}" rx="10" fill="#111827"/>',
            *texts,
            "</svg>",
            "",
        ]
    )


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description="Record a conversation as an SVG.")
    parser.add_argument("file", type=Path)
    parser.add_argument("questions", nargs="+")
    args = parser.parse_args()
    command = [sys.executable, "-m", "jaxllm", "chat"]
    args.file.write_text(draw(record(command, args.questions)), encoding="utf-8")


if __name__ == "__main__":
    main()
