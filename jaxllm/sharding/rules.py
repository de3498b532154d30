"""Sharding rules as data: logical dim -> mesh axis, separately for parameters and activations.

A shipped name or a TOML path -> `ShardingRules`, checked against a mesh and a model. Plain Python: it knows the
names of dims and axes and the sizes of a model, not arrays or devices.

Tokens have one name per place, so that each may be cut otherwise: `tokens` in the attention half of a block,
`ffn_tokens` and `expert_tokens` in a dense or routed feed-forward half, `residual_tokens` between the halves, and
`rows` (those that sample) at the LM head. `pages` cuts the KV cache: every part is a replica with pages of its own.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxllm.config import ModelConfig

MESH_AXES = ("dp", "fsdp", "cp", "ep", "tp")
TOKEN_DIMS = ("tokens", "ffn_tokens", "expert_tokens", "residual_tokens", "rows")
CUTTABLE_DIMS = frozenset(
    (*TOKEN_DIMS, *"pages model model_in model_out heads heads_in ffn ffn_in vocab experts".split())
)
# A cut inside a head would make QK^T a partial sum before its softmax; the others stack kinds, not features.
UNCUTTABLE_DIMS = frozenset(("head_dim", "qkv", "group", "gate_up"))


Axes = str | tuple[str, ...] | None  # one mesh axis, several (the first is the coarsest cut), or no cut


@dataclass(frozen=True, slots=True)
class ShardingRules:
    """Logical dim -> mesh axis or axes; a dim that is not named is not cut.

    Attributes:
        parameters: where weights lie. activations: where what is computed lies, the KV pages included.
        gather_weights: axes whose cut of a block's weights is undone just before the block uses them.
    """

    name: str
    parameters: Mapping[str, Axes] = field(default_factory=dict)
    activations: Mapping[str, Axes] = field(default_factory=dict)
    gather_weights: tuple[str, ...] = ()

    def axes(self, dims: tuple[str | None, ...], *, parameter: bool) -> tuple[Axes, ...]:
        """Mesh axes for each dim of one array. One axis twice in one array is refused."""
        table = self.parameters if parameter else self.activations
        axes = tuple(None if dim is None else table.get(dim) for dim in dims)
        used = [axis for part in axes for axis in as_tuple(part)]
        if len(used) != len(set(used)):
            raise ValueError(
                f"sharding rules {self.name!r} put axis {max(used, key=used.count)!r} on two dims of one array {dims}; "
                "give one of them another axis or none"
            )
        return axes


def as_tuple(axes: Axes) -> tuple[str, ...]:
    """The axes of one dim, coarsest first."""
    return () if axes is None else (axes,) if isinstance(axes, str) else axes


def num_parts(axes: Axes, mesh: Mapping[str, int]) -> int:
    """Into how many parts these axes cut a dim; axes that the mesh lacks do not cut."""
    return math.prod(mesh.get(axis, 1) for axis in as_tuple(axes))


def fitting(axes: Axes, size: int, mesh: Mapping[str, int]) -> Axes:
    """The axes that cut a dim of `size` evenly: finer ones are left out first."""
    kept = as_tuple(axes)
    while size % num_parts(kept, mesh):
        kept = kept[:-1]
    return kept


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
    if unknown := set(data) - {"parameters", "activations", "gather_weights"}:
        raise ValueError(
            f"sharding rules {path} have an unknown table {min(unknown)!r}; use parameters and activations "
            "(and gather_weights, a list of axes)"
        )
    parameters, activations = (_checked_table(path, kind, data.get(kind, {})) for kind in ("parameters", "activations"))
    gathered = _checked_axes(path, "gather_weights", data.get("gather_weights", []))
    _check_pages(path, activations)
    return ShardingRules(path.stem, parameters, activations, as_tuple(gathered))


def _checked_table(path: Path, kind: str, table: object) -> dict[str, Axes]:
    if not isinstance(table, dict):
        raise ValueError(f"sharding rules {path}: {kind} must be a table of dim = axis")
    for dim in table:
        if dim not in CUTTABLE_DIMS:
            what = "cannot be cut" if dim in UNCUTTABLE_DIMS else "is unknown"
            raise ValueError(
                f"sharding rules {path}: dim {dim!r} {what}; use one of {', '.join(sorted(CUTTABLE_DIMS))}"
            )
    return {dim: _checked_axes(path, dim, axes) for dim, axes in table.items()}


def _checked_axes(path: Path, dim: str, value: object) -> Axes:
    axes: list[Any] = value if isinstance(value, list) else [value]
    if not all(axis in MESH_AXES for axis in axes):
        raise ValueError(
            f"sharding rules {path}: {dim} = {value!r} is no mesh axis; axes are {', '.join(MESH_AXES)}, "
            "alone or in a list"
        )
    if len(axes) != len(set(axes)):
        raise ValueError(f"sharding rules {path}: {dim} = {value!r} names an axis twice; name each axis once")
    return axes[0] if len(axes) == 1 else tuple(axes) or None


def _check_pages(path: Path, activations: Mapping[str, Axes]) -> None:
    """A replica's tokens see its own pages only, so what cuts the pages cuts the tokens first."""
    pages, tokens = as_tuple(activations.get("pages")), as_tuple(activations.get("tokens"))
    if len(tokens) > len(pages) + 1:
        raise ValueError(
            f"sharding rules {path}: tokens = {list(tokens)} has more than one axis beyond pages = {list(pages)}; "
            "keys and values go round one ring, so leave one"
        )
    if tokens[: len(pages)] != pages:
        raise ValueError(
            f"sharding rules {path}: pages = {list(pages)} but tokens = {list(tokens)}; tokens must begin with the "
            "axes of pages, since the tokens of a replica see its own pages only"
        )


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
    legal = [s for s in range(1, config.num_heads + 1) if _heads_cut(config, s)]
    copies = 1
    for axes in (rules.parameters.get("heads"), rules.activations.get("heads")):
        size = num_parts(axes, mesh)
        if size not in legal:
            raise ValueError(
                f"num_heads={config.num_heads} and num_kv_heads={config.num_kv_heads} do not divide by mesh axis "
                f"{_named(axes)}={size} between heads; use {_named(axes)}={_alternatives(legal)}"
            )
        copies = max(copies, size // config.num_kv_heads)
    return copies


def _named(axes: Axes) -> str:
    return "*".join(as_tuple(axes))


def _heads_cut(config: ModelConfig, size: int) -> bool:
    """Whether `size` devices each get whole query heads and the key/value heads they need."""
    n, k = config.num_heads, config.num_kv_heads
    return n % size == 0 and (k % size == 0 or size % k == 0)


def _alternatives(sizes: list[int]) -> str:
    head, last = ", ".join(map(str, sizes[:-1])), str(sizes[-1])
    return f"{head} or {last}" if head else last


def vocab_padding(config: ModelConfig, rules: ShardingRules, mesh: Mapping[str, int]) -> int:
    """Rows added to the vocabulary tables so that they divide by the mesh."""
    return -config.vocab_size % num_parts(rules.parameters.get("vocab"), mesh)


def check_divides(
    name: str, shape: tuple[int, ...], dims: tuple[str, ...], axes: tuple[Axes, ...], mesh: Mapping[str, int]
) -> None:
    """Raise ValueError where a dim of one array does not divide by its mesh axes."""
    for dim, size, axis in zip(dims, shape, axes, strict=True):
        if size % (parts := num_parts(axis, mesh)):
            legal = [s for s in range(1, 65) if size % s == 0]
            raise ValueError(
                f"{name}: dim {dim}={size} does not divide by mesh axis {_named(axis)}={parts}; "
                f"use {_named(axis)}={_alternatives(legal)}"
            )
