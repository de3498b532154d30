"""What each device holds after every step of one block, and which collectives the compiler put there.

Shapes and slices follow from the rules, at the places where the decoder constrains its activations; collectives are
those found in the compiled program. Arrays in, plain data out.

Dimension letters: T tokens, D model width, K key/value heads, G query heads per key/value head, N query heads, H head
width, F feed-forward width.
"""

from __future__ import annotations

from typing import Any

from jaxllm.config import ModelConfig
from jaxllm.deployment.program_text import Found
from jaxllm.ops.contraction import in_order
from jaxllm.sharding.mesh import Dims, Placement

# The step that a matrix product makes, by its einsum as the compiler names it.
_PRODUCTS = {
    "TD,DKXH->TKXH": "qkv",
    "TD,DNH->TNH": "queries",
    "TR,RNH->TNH": "queries",
    "TKGH,KGHD->TD": "after attention",
    "TNH,NHD->TD": "after attention",
    "TD,DXF->TXF": "ffn hidden",
    "TF,FD->TD": "after ffn",
}
_MAX_COLUMNS = 4


def block_table(
    cfg: ModelConfig, placement: Placement, kv_copies: int, num_tokens: int, found: list[Found]
) -> list[dict[str, Any]]:
    """One entry per step: its dims and shape, what every device holds of it, and the collectives that made it so."""
    sent: dict[str, list[dict[str, Any]]] = {}
    for one in found:
        if one.block == 0:
            step = next((step for einsum, step in _PRODUCTS.items() if in_order(einsum) in one.source), "elsewhere")
            sent.setdefault(step, []).append({"kind": one.kind, "bytes": one.num_bytes})
    table, placement = [], placement.fitted(num_tokens)
    for step, dims, shape in _steps(cfg, kv_copies, num_tokens):
        collectives = sent.pop(step, [])
        table.append(
            {
                "step": step,
                "dims": dims,
                "shape": shape,
                "collectives": collectives,
                "devices": _devices(placement, dims, shape),
            }
        )
    left = [collective for collectives in sent.values() for collective in collectives]
    if left:
        table.append({"step": "elsewhere", "dims": [], "shape": [], "collectives": left, "devices": []})
    return table


def _steps(cfg: ModelConfig, kv_copies: int, t: int) -> list[tuple[str, Dims, tuple[int, ...]]]:
    d, h, k = cfg.hidden_size, cfg.head_dim, cfg.num_kv_heads * kv_copies
    residual = ("residual_tokens", "model")
    steps: list[tuple[str, Dims, tuple[int, ...]]] = [("x", residual, (t, d))]
    if cfg.latent:
        n, width = cfg.num_heads, cfg.latent.nope_dim + cfg.latent.rope_dim
        steps.append(("queries", ("tokens", "heads", "head_dim"), (t, n, width)))
        steps.append(("attention out", ("tokens", "heads_in", "head_dim"), (t, n, cfg.latent.value_dim)))
    else:
        g = cfg.num_heads // k
        steps.append(("qkv", ("tokens", "heads", "qkv", "head_dim"), (t, k, g + 2, h)))
        steps.append(("attention out", ("tokens", "heads_in", "group", "head_dim"), (t, k, g, h)))
    steps.append(("after attention", residual, (t, d)))
    if cfg.experts and cfg.is_routed(0):
        e = cfg.experts
        steps.append(
            ("expert hidden", ("experts", "expert_tokens", "ffn_in"), (e.num_experts, t * e.per_token, e.ffn_size))
        )
    else:
        steps.append(("ffn hidden", ("ffn_tokens", "ffn_in"), (t, cfg.intermediate_size)))
    return [*steps, ("after ffn", residual, (t, d))]


def _devices(placement: Placement, dims: Dims, shape: tuple[int, ...]) -> list[dict[str, Any]]:
    """Each device, in the order of the mesh: what it is there, and `[start, stop]` of every dim."""
    import numpy as np

    sharding = placement.sharding(*dims)
    indices = sharding.devices_indices_map(shape)
    held = []
    for place, device in np.ndenumerate(placement.mesh.devices):
        box = [list(part.indices(size)[:2]) for part, size in zip(indices[device], shape, strict=True)]
        held.append(
            {
                "device": device.id,
                "mesh": dict(zip(placement.mesh.axis_names, place, strict=True)),
                "slices": box,
                "shape": [stop - start for start, stop in box],
            }
        )
    return held


def format_block(table: list[dict[str, Any]]) -> list[str]:
    """Lines for a person: a column per device, as far as they fit."""
    devices = table[0]["devices"]
    shown = devices if len(devices) <= _MAX_COLUMNS else [*devices[: _MAX_COLUMNS - 1], devices[-1]]
    places = [devices.index(device) for device in shown]
    names = [",".join(f"{axis}={at}" for axis, at in d["mesh"].items()) for d in shown]
    rows = [["one block", "dims", *names, "collectives"]]
    for step in table:
        dims = ",".join(f"{dim or '-'}={size}" for dim, size in zip(step["dims"], step["shape"], strict=True))
        held = [_slices(step, step["devices"][i]) if step["devices"] else "" for i in places]
        sent = ", ".join(f"{c['kind']} ({c['bytes']:,} bytes)" for c in step["collectives"])
        rows.append([step["step"], dims, *held, sent])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _slices(step: dict[str, Any], device: dict[str, Any]) -> str:
    """`[:, 0:32]`: a colon where the whole dim is held."""
    parts = []
    for (start, stop), size in zip(device["slices"], step["shape"], strict=True):
        parts.append(":" if stop - start == size else f"{start}:{stop}")
    return f"[{', '.join(parts)}]"
