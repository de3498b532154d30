"""Sharding rules as data: logical dim -> mesh axis, separately for parameters and activations.

A shipped name or a TOML path -> `ShardingRules`, checked against a mesh and a model. Plain Python: it knows the
names of dims and axes and the sizes of a model, not arrays or devices.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from jaxllm.config import ModelConfig

MESH_AXES = ("dp", "tp")
CUTTABLE_DIMS = frozenset(
    ("tokens", "rows", "model", "model_in", "model_out", "heads", "heads_in", "ffn", "ffn_in", "vocab")
)
# A cut inside a head would make QK^T a partial sum before its softmax; the others stack kinds, not features.
UNCUTTABLE_DIMS = frozenset(("head_dim", "qkv", "group", "gate_up"))


@dataclass(frozen=True, slots=True)
class ShardingRules:
    """Logical dim -> mesh axis; a dim that is not named is not cut."""

    name: str
    parameters: Mapping[str, str] = field(default_factory=dict)
    activations: Mapping[str, str] = field(default_factory=dict)

    def axes(self, dims: tuple[str | None, ...], *, parameter: bool) -> tuple[str | None, ...]:
        """Mesh axis or None for each dim of one array. One axis twice in one array is refused."""
        table = self.parameters if parameter else self.activations
        axes = tuple(None if dim is None else table.get(dim) for dim in dims)
        used = [axis for axis in axes if axis is not None]
        if len(used) != len(set(used)):
            raise ValueError(
                f"sharding rules {self.name!r} put axis {max(used, key=used.count)!r} on two dims of one array {dims}; "
                "give one of them another axis or none"
            )
        return axes


def rules_folder() -> Path:
    """The shipped rule files: inside the installed package, or beside it in a checkout."""
    installed = Path(__file__).parent / "_rules"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "sharding_rules"


def load_rules(name_or_path: str) -> ShardingRules:
    """Read rules by shipped name (`megatron`) or path (`my.toml`). Raises ValueError that names the fault."""
    path = Path(name_or_path)
    if path.suffix != ".toml":
        path = rules_folder() / f"{name_or_path}.toml"
    if not path.is_file():
        shipped = ", ".join(sorted(p.stem for p in rules_folder().glob("*.toml")))
        raise ValueError(f"no sharding rules {name_or_path!r}; use a path ending in .toml or one of {shipped}")
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"sharding rules {path} are not valid TOML: {error}") from None
    if unknown := set(data) - {"parameters", "activations"}:
        raise ValueError(
            f"sharding rules {path} have an unknown table {min(unknown)!r}; use parameters and activations"
        )
    tables = {kind: _checked_table(path, kind, data.get(kind, {})) for kind in ("parameters", "activations")}
    return ShardingRules(path.stem, **tables)


def _checked_table(path: Path, kind: str, table: object) -> dict[str, str]:
    if not isinstance(table, dict):
        raise ValueError(f"sharding rules {path}: {kind} must be a table of dim = axis")
    for dim, axis in table.items():
        if dim not in CUTTABLE_DIMS:
            what = "cannot be cut" if dim in UNCUTTABLE_DIMS else "is unknown"
            raise ValueError(
                f"sharding rules {path}: dim {dim!r} {what}; use one of {', '.join(sorted(CUTTABLE_DIMS))}"
            )
        if axis not in MESH_AXES:
            raise ValueError(
                f"sharding rules {path}: {dim} = {axis!r} is no mesh axis; axes are {', '.join(MESH_AXES)}"
            )
    return dict(table)


def parse_mesh(text: str) -> dict[str, int]:
    """`"dp=2,tp=4"` -> `{"dp": 2, "tp": 4}`."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = part.strip().partition("=")
        if axis not in MESH_AXES or not (size.isascii() and size.isdecimal()) or int(size) < 1:
            raise ValueError(
                f"mesh {text!r} is not understood at {part!r}; write axis=size pairs like 'tp=4' "
                f"with axes {', '.join(MESH_AXES)}"
            )
        if axis in sizes:
            raise ValueError(f"mesh {text!r} names axis {axis!r} twice; name each axis once")
        sizes[axis] = int(size)
    return sizes


def kv_copies(config: ModelConfig, rules: ShardingRules, mesh: Mapping[str, int]) -> int:
    """How often each key/value head is repeated so that every device holds whole heads (1 = not at all).

    Raises ValueError naming the legal sizes where the cut would fall inside a head.
    """
    axis = rules.parameters.get("heads")
    size = mesh.get(axis, 1) if axis else 1
    legal = [s for s in range(1, config.num_heads + 1) if _heads_cut(config, s)]
    if size not in legal:
        raise ValueError(
            f"num_heads={config.num_heads} and num_kv_heads={config.num_kv_heads} do not divide by mesh axis "
            f"{axis}={size} between heads; use {axis}={_alternatives(legal)}"
        )
    return max(1, size // config.num_kv_heads)


def _heads_cut(config: ModelConfig, size: int) -> bool:
    """Whether `size` devices each get whole query heads and the key/value heads they need."""
    n, k = config.num_heads, config.num_kv_heads
    return n % size == 0 and (k % size == 0 or size % k == 0)


def _alternatives(sizes: list[int]) -> str:
    head, last = ", ".join(map(str, sizes[:-1])), str(sizes[-1])
    return f"{head} or {last}" if head else last


def vocab_padding(config: ModelConfig, rules: ShardingRules, mesh: Mapping[str, int]) -> int:
    """Rows added to the vocabulary tables so that they divide by the mesh."""
    axis = rules.parameters.get("vocab")
    return -config.vocab_size % mesh.get(axis, 1) if axis else 0


def check_divides(name: str, shape: tuple[int, ...], dims: tuple[str, ...], axes: tuple[str | None, ...],
                  mesh: Mapping[str, int]) -> None:  # fmt: skip
    """Raise ValueError where a dim of one array does not divide by its mesh axis."""
    for dim, size, axis in zip(dims, shape, axes, strict=True):
        if axis is not None and size % mesh.get(axis, 1):
            legal = [s for s in range(1, 65) if size % s == 0]
            raise ValueError(
                f"{name}: dim {dim}={size} does not divide by mesh axis {axis}={mesh[axis]}; "
                f"use {axis}={_alternatives(legal)}"
            )
