"""Files of examples: recognised by their keys, and refused with the file and line of what is wrong.

A path -> `Example`s, one at a time; nothing is skipped. Knows nothing of tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORMS = "messages; instruction, input and output; prompt and completion; text; or text and label"
_SUFFIXES = (".txt", ".jsonl", ".json", ".tsv")
_TEXT_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One example, as its file has it.

    Attributes:
        place: `file:line`, or `file: entry N` of a JSON list, for messages.
        text: a whole text, or a piece of one that goes on in the next example.
        completion: what follows `text`, where only that is to be learned.
        messages: a conversation.
        label: of a text.
    """

    place: str
    text: str | None = None
    completion: str | None = None
    messages: list[dict[str, Any]] | None = None
    label: str | None = None


@dataclass(frozen=True, slots=True)
class Splits:
    """The files of one run; `valid` and `test` are None where they are to be cut from `train`."""

    train: Path
    valid: Path | None
    test: Path | None


def find_files(data: str, eval_data: str | None) -> Splits:
    """The files that a path names: one, or a folder with train, valid and test (as mlx-lm has it)."""
    path = Path(data)
    if path.is_dir():
        train, valid, test = (_in_folder(path, name) for name in ("train", "valid", "test"))
        if train is None:
            raise ValueError(f"{path} has no train.jsonl (or .json, .tsv, .txt); name a file, or add it")
        return Splits(train, Path(eval_data) if eval_data else valid, test)
    for file in (path, *([Path(eval_data)] if eval_data else [])):
        if not file.is_file():
            raise ValueError(f"{file}: no such file; data is a text, .jsonl, .json or .tsv file, or a folder")
    return Splits(path, Path(eval_data) if eval_data else None, None)


def _in_folder(folder: Path, name: str) -> Path | None:
    return next((file for suffix in _SUFFIXES if (file := folder / f"{name}{suffix}").is_file()), None)


def is_plain_text(path: Path) -> bool:
    """Whether a file is one long text."""
    return path.suffix not in (".jsonl", ".json", ".tsv")


def read_text(path: Path) -> Iterator[str]:
    """A plain text in pieces that end at line ends. Raises ValueError for an empty file or bad bytes."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            empty = True
            while piece := file.read(_TEXT_BLOCK):
                piece += file.readline()
                empty = False
                yield piece
    except UnicodeDecodeError:
        raise ValueError(f"{path}:{_bad_line(path)}: not UTF-8 text; convert the file") from None
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    if empty:
        raise ValueError(f"{path}: the file is empty")


def _bad_line(path: Path) -> int:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return 0


def read_examples(path: Path) -> Iterator[Example]:
    """Every example of a JSONL, JSON or TSV file, in order. Raises ValueError that names the file and the line."""
    reader = {".json": _json_list, ".tsv": _tsv}.get(path.suffix, _jsonl)
    found = False
    for place, entry in reader(path):
        found = True
        yield _example(place, entry)
    if not found:
        raise ValueError(f"{path}: the file is empty")


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(
        "".join(read_text(path)).split("\n") if path.stat().st_size < 1 << 24 else _streamed(path), 1
    ):
        if line.strip():
            yield f"{path}:{number}", line.removesuffix("\r")


def _streamed(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8", newline="\n") as file:
        try:
            for line in file:
                yield line.removesuffix("\n")
        except UnicodeDecodeError:
            raise ValueError(f"{path}:{_bad_line(path)}: not UTF-8 text; convert the file") from None


def _jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    for place, line in _lines(path):
        try:
            yield place, json.loads(line)
        except ValueError as error:
            raise ValueError(f"{place}: not JSON: {error}; correct or remove the line") from None


def _json_list(path: Path) -> Iterator[tuple[str, Any]]:
    text = "".join(read_text(path))
    try:
        entries = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON: {error.msg}; correct the file") from None
    if not isinstance(entries, list):
        raise ValueError(f"{path}:1: expected a JSON list of examples")
    for number, entry in enumerate(entries, 1):
        yield f"{path}: entry {number}", entry


def _tsv(path: Path) -> Iterator[tuple[str, Any]]:
    """`label`, tab, text; a first line that says `label` and `text` names the columns."""
    order = ("label", "text")
    for number, (place, line) in enumerate(_lines(path)):
        cells = line.split("\t")
        if number == 0 and sorted(cell.strip().lower() for cell in cells) == ["label", "text"]:
            order = tuple(cell.strip().lower() for cell in cells)
            continue
        if len(cells) != 2:
            raise ValueError(f"{place}: expected a label, one tab and a text; got {len(cells)} columns")
        yield place, dict(zip(order, cells, strict=True))


def _example(place: str, entry: Any) -> Example:
    if not isinstance(entry, dict):
        if isinstance(entry, list) and entry and all(isinstance(turn, dict) and "role" in turn for turn in entry):
            entry = {"messages": entry}  # nanochat's lines
        else:
            raise ValueError(f"{place}: expected an object with {FORMS}")
    if "messages" in entry:
        return Example(place=place, messages=_messages(place, entry["messages"]))
    if "instruction" in entry:
        asked, given, answer = (_text(place, entry, key) for key in ("instruction", "input", "output"))
        question = f"{asked}\n\n{given}" if given else asked
        return Example(place=place, messages=_messages(place, _turns(question, answer)))
    if "prompt" in entry:
        return Example(place=place, text=_text(place, entry, "prompt"), completion=_text(place, entry, "completion"))
    if "text" in entry:
        label = entry.get("label")
        if label is not None and not isinstance(label, str | int):
            raise ValueError(f"{place}: label {label!r} is neither a word nor a number")
        return Example(place=place, text=_text(place, entry, "text"), label=None if label is None else str(label))
    raise ValueError(f"{place}: has {', '.join(map(str, entry)) or 'nothing'}; expected {FORMS}")


def _text(place: str, entry: dict[str, Any], key: str) -> str:
    value = entry.get(key, "" if key == "input" else None)
    if not isinstance(value, str) or not (value or key == "input"):
        raise ValueError(f"{place}: {key} is {'missing' if value is None else 'empty or no text'}")
    return value


def _turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _messages(place: str, messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not all(isinstance(turn, dict) and "role" in turn for turn in messages):
        raise ValueError(f"{place}: messages must be a list of objects with role and content")
    if not any(turn["role"] == "assistant" for turn in messages):
        raise ValueError(f"{place}: no message is the assistant's, so there is nothing to learn from it")
    return messages
