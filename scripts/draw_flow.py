"""The picture at the top of the README, drawn from the text below: how a request flows through the rooms.

    python scripts/draw_flow.py [FILE.svg]      default: docs/flow.svg

One line per station: column, row, room, what happens there. One line per arrow: from, to, what is handed over.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from html import escape
from pathlib import Path

STATIONS = """
    0 0 server/      | HTTP, OpenAI's API
    0 1 entrypoints/ | Python, scripts
    1 0 tokenizer/   | text to token ids
    2 0 engine/      | Request
    3 0 scheduling/  | who runs next, which page is whose
    4 0 runner/      | one flat ragged batch
    5 0 models/      | the decoder, one compiled program
    3 1 kv/          | pages: device, host, disk
    4 1 sharding/    | rule files: which dim lies where
    5 1 ops/         | attention, products: XLA, CPU, GPU, TPU
    2 1 parsing | text, thoughts and calls as they come
"""
ARROWS = """
    0,0 > 1,0 : prompt
    0,1 > 1,0 :
    1,0 > 2,0 : ids
    2,0 > 3,0 :
    3,0 > 4,0 : plan
    4,0 > 5,0 : arrays
    3,0 > 3,1 : moves
    4,1 > 5,0 :
    5,1 > 5,0 :
    3,1 > 4,0 : pages
"""
CAPTION = ("plain Python decides", "arrays compute")
BACK = "sampled tokens: the next iteration is dispatched before these are read"
_WIDTH, _HEIGHT, _GAP, _ROW = 134, 66, 40, 140
_LEFT, _TOP = 20, 62
_STYLE = """
    text { font-family: system-ui, sans-serif; fill: #1f2937; }
    .room { font: 600 13px ui-monospace, monospace; fill: #1d4ed8; }
    .what, .arrow { font-size: 11.5px; } .arrow { fill: #6b7280; } .lane { font-size: 13px; fill: #6b7280; }
    rect { fill: #f8fafc; stroke: #94a3b8; rx: 8; } path { fill: none; stroke: #64748b; stroke-width: 1.4; }
    @media (prefers-color-scheme: dark) { .back { fill: #ffffff; } }
"""


@dataclass(frozen=True, slots=True)
class Station:
    """A box: where it stands, whose room it is and what happens there."""

    column: int
    row: int
    room: str
    what: str

    @property
    def left(self) -> int:
        """Pixels."""
        return _LEFT + self.column * (_WIDTH + _GAP)

    @property
    def top(self) -> int:
        """Pixels."""
        return _TOP + self.row * _ROW


def stations() -> dict[tuple[int, int], Station]:
    """The boxes, by column and row."""
    found = {}
    for line in STATIONS.strip().splitlines():
        column, row, rest = line.split(maxsplit=2)
        room, _, what = rest.partition("|")
        found[int(column), int(row)] = Station(int(column), int(row), room.strip(), what.strip())
    return found


def draw() -> str:
    """The picture as SVG text."""
    boxes = stations()
    width = _LEFT * 2 + 6 * _WIDTH + 5 * _GAP
    height = _TOP + _ROW + _HEIGHT + 44
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
        "<title>How a request flows through jaxllm</title>",
        f"<style>{_STYLE}</style>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 L8 4 L0 8 z" style="fill:#64748b;stroke:none"/></marker></defs>',
        f'<rect class="back" x="0" y="0" width="{width}" height="{height}" style="fill:#ffffff;stroke:none"/>',
    ]
    middle = boxes[4, 0].left - _GAP // 2
    parts.append(f'<path d="M{middle} 14 V{height - 40}" style="stroke-dasharray:3 5;stroke:#cbd5e1"/>')
    parts.append(f'<text class="lane" x="{middle - 12}" y="24" text-anchor="end">{CAPTION[0]}</text>')
    parts.append(f'<text class="lane" x="{middle + 12}" y="24">{CAPTION[1]}</text>')
    parts += [_box(box) for box in boxes.values()]
    parts += [_arrow(boxes, line) for line in ARROWS.strip().splitlines()]
    first, last = boxes[2, 1], boxes[5, 0]
    y = height - 18
    parts.append(
        f'<path d="M{last.left + _WIDTH} {last.top + 33} h10 V{y} H{first.left + 60} V{first.top + _HEIGHT}" '
        'marker-end="url(#tip)"/>'
    )
    parts.append(f'<text class="arrow" x="{first.left + 76}" y="{y - 6}">{BACK}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _box(box: Station) -> str:
    lines = _wrapped(box.what, 22)
    text = [
        f'<rect x="{box.left}" y="{box.top}" width="{_WIDTH}" height="{_HEIGHT}"/>',
        f'<text class="room" x="{box.left + 9}" y="{box.top + 19}">{escape(box.room)}</text>',
    ]
    for i, line in enumerate(lines):
        text.append(f'<text class="what" x="{box.left + 9}" y="{box.top + 38 + 15 * i}">{escape(line)}</text>')
    return "".join(text)


def _arrow(boxes: dict[tuple[int, int], Station], line: str) -> str:
    ends, _, label = line.partition(":")
    source, target = (boxes[tuple(map(int, end.split(",")))] for end in ends.split(">"))  # type: ignore[index]
    if source.row == target.row:
        x, y = source.left + _WIDTH, source.top + _HEIGHT // 2
        path, at = f"M{x} {y} H{target.left - 2}", (x + _GAP // 2, source.top - 8, "middle")
    elif source.column == target.column:
        x, down = source.left + _WIDTH // 2, target.row > source.row
        y, end = (source.top + _HEIGHT, target.top - 2) if down else (source.top, target.top + _HEIGHT + 2)
        path, at = f"M{x} {y} V{end}", (x - 7, (y + end) // 2 + 4, "end")
    else:
        x, end = source.left + _WIDTH - 24, target.left + 24
        path, at = f"M{x} {source.top} L{end} {target.top + _HEIGHT + 3}", (x + 44, source.top - 22, "start")
    drawn = f'<path d="{path}" marker-end="url(#tip)"/>'
    if label := label.strip():
        drawn += f'<text class="arrow" x="{at[0]}" y="{at[1]}" text-anchor="{at[2]}">{escape(label)}</text>'
    return drawn


def _wrapped(text: str, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


if __name__ == "__main__":
    Path(sys.argv[1] if len(sys.argv) > 1 else "docs/flow.svg").write_text(draw(), encoding="utf-8")
