"""A compiled program's text, read: its collectives, and what they move. Knows nothing of who compiled it, or why."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

KINDS: tuple[str, ...] = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_INSTRUCTION = re.compile(
    r"= (?P<type>\([^=]*?\)|\S+) (?P<kind>" + "|".join(KINDS) + r")(?P<start>-start)?\((?P<rest>.*)$", re.MULTILINE
)
# Three spellings of who takes part: [groups,size]<=[...], lists of lists, a mesh with some of its axes.
_GROUPS = re.compile(
    r"replica_groups=(?:\[\d+,(?P<iota>\d+)\]|\{\{(?P<first>[\d,]+)\}|mesh\[(?P<mesh>[^\]]*)\] \{(?P<axes>[^}]*)\})"
)
# A TPU program spells a reduce-scatter as a fusion that calls an all-reduce and a slice.
_SCATTER_BODY = re.compile(r"^%all-reduce-scatter\S* \([^\n]*\{\n.*?^\}", re.MULTILINE | re.DOTALL)
_SCATTER_CALL = re.compile(r" fusion(\([^\n]*calls=%all-reduce-scatter)")
_CHAIN = re.compile(r'\bchain_id="(\d+)"')
_BLOCK = re.compile(r'op_name="[^"]*?block_(\d+)')
_SOURCE = re.compile(r'op_name="([^"]*)"')
_ARRAY = re.compile(r"\b([a-z]+\d+|pred)\[([\d,]*)\]")
_ITEM_BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "f8": 1,
    "bf16": 2,
    "f16": 2,
    "s16": 2,
    "u16": 2,
    "f64": 8,
    "s64": 8,
    "u64": 8,
}


@dataclass(frozen=True, slots=True)
class Found:
    """One collective in a compiled program.

    Attributes:
        num_bytes: what each device ends with.
        group_size: devices that take part together; 0 where the text does not say.
        block: of the decoder, or None outside of all.
        source: the operation it was made for, as the compiler knows it.
        position: where in the text; the order within a computation is the order of execution.
    """

    kind: str
    num_bytes: int
    group_size: int
    block: int | None
    source: str
    position: int


@dataclass(frozen=True, slots=True)
class CompiledProgram:
    """What the compiler said of one program, in bytes of one device."""

    temporaries: int
    arguments: int
    donated: int
    code: int
    collectives: list[Found]
    page_layouts: int


def find_collectives(text: str) -> list[Found]:
    """Every collective of a compiled program's text."""
    found = []
    for match in _distinct(text):
        rest = match["rest"]
        block, source = _BLOCK.search(rest), _SOURCE.search(rest)
        found.append(
            Found(
                kind=match["kind"],
                num_bytes=_bytes(match["type"], is_start=match["start"] is not None),
                group_size=_group_size(rest),
                block=int(block[1]) if block else None,
                source=source[1] if source else "",
                position=match.start(),
            )
        )
    return found


def _distinct(text: str) -> Iterator[re.Match[str]]:
    """Each collective once: a TPU program that overlaps one with products repeats it in each link of a chain."""
    text = _SCATTER_CALL.sub(r" reduce-scatter\1", _SCATTER_BODY.sub("", text))
    seen: set[str] = set()
    for match in _INSTRUCTION.finditer(text):
        chain = _CHAIN.search(match["rest"])
        if chain is None or chain[1] not in seen:
            seen.update(chain.groups() if chain else ())
            yield match


def _group_size(attributes: str) -> int:
    if "source_target_pairs={{" in attributes:
        return 2
    if (match := _GROUPS.search(attributes)) is None:
        return 0
    if match["iota"]:
        return int(match["iota"])
    if match["first"]:
        return match["first"].count(",") + 1
    sizes = dict(part.split("=") for part in match["mesh"].split(","))
    return math.prod(int(sizes[axis.strip()]) for axis in match["axes"].split(",") if axis.strip())


def count_by_kind(found: list[Found]) -> dict[str, int]:
    """How many there are of each kind."""
    return {kind: sum(f.kind == kind for f in found) for kind in KINDS}


def _bytes(array_type: str, *, is_start: bool) -> int:
    """Bytes of one instruction's result on one device; a tuple is the sum of its parts.

    An asynchronous start gives back its operands beside its results; the results are the larger.
    """
    sizes = [
        math.prod(int(n) for n in dims.split(",") if n) * _ITEM_BYTES.get(name, 4)
        for name, dims in _ARRAY.findall(array_type)
    ]
    return max(sizes, default=0) if is_start else sum(sizes)
