"""Which files are GGUF, and the names of the parts of a split model: `NAME-00001-of-00003.gguf`."""

from __future__ import annotations

import re
from pathlib import Path

PART = re.compile(r"(?P<name>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.ASCII | re.DOTALL)
_MAX_PARTS = 10_000


def is_gguf(path: Path) -> bool:
    """Whether a file is GGUF by its name or, where other programs keep it under another one, by how it begins."""
    if path.suffix.lower() == ".gguf":
        return True
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False


def is_later_part(path: Path) -> bool:
    """Whether the name says that this is a part of a model, but not its first."""
    match = PART.fullmatch(path.name)
    return match is not None and int(match["number"]) != 1


def part_files(path: Path) -> list[Path]:
    """The files that the model at `path` consists of, by its name alone: `path`, or all parts of which it is one."""
    match = PART.fullmatch(path.name)
    if match is None or not 1 < int(match["count"]) <= _MAX_PARTS:
        return [path]
    return [path.with_name(part_name(match, number)) for number in range(1, int(match["count"]) + 1)]


def part_name(match: re.Match[str], number: int) -> str:
    """The name of another part of the same model."""
    return f"{match['name']}-{number:05}-of-{match['count']}.gguf"
