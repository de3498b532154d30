"""A model on a chip over a sweep of contexts -> points of the roofline, as JSON and as a table.

Each point has the linear model's figures and, under `with_attention`, those of the full one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxllm.config import ModelConfig
from jaxllm.roofline.chips import Chip
from jaxllm.roofline.collective_time import all_reduce_seconds
from jaxllm.roofline.cost_model import (
    ITEM_BYTES,
    Cost,
    active_parameters,
    crossing_tokens,
    iteration_cost,
    linear_cost,
    model_cost,
    step_seconds,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A model in its dtypes on `tp` chips that share every matrix (`megatron` rules)."""

    name: str
    config: ModelConfig
    chip: Chip
    tp: int = 1
    weight_dtype: str = "bfloat16"
    kv_dtype: str = "bfloat16"

    @property
    def kv_copies(self) -> int:
        """How often the chips together store each key and value: a latent row cannot be cut."""
        row = self.config.cache_row
        return max(1, self.tp // row.heads) if row.is_cut else self.tp

    @property
    def kv_token_bytes(self) -> int:
        """K_tok over all chips."""
        return int(self.config.kv_bytes_per_token(ITEM_BYTES[self.kv_dtype]) * self.kv_copies)

    @property
    def weight_bytes(self) -> int:
        """All weights."""
        return int(self.config.num_parameters * ITEM_BYTES[self.weight_dtype])

    @property
    def flops_per_s(self) -> float:
        """Peak of all chips; 8-bit weights meet 8-bit activations."""
        return self.tp * (self.chip.flops_8bit if ITEM_BYTES[self.weight_dtype] == 1 else self.chip.flops)

    @property
    def bytes_per_s(self) -> float:
        """Memory bandwidth of all chips."""
        return self.tp * self.chip.bandwidth

    @property
    def ridge(self) -> float:
        """FLOPs per byte where the roofs meet."""
        return self.flops_per_s / self.bytes_per_s


def roofline(setting: Setting, *, batch: int, contexts: Sequence[int], chunk: int) -> dict[str, Any]:
    """One decode and one prefill point per context. Keys as in `jaxllm roofline --json`.

    Args:
        setting: what runs where.
        batch: rows of a decode iteration, each with `context` tokens in the cache.
        contexts: the sweep.
        chunk: tokens of a prefill iteration: one request that has `context` tokens in the cache already.
    """
    points = [_point(setting, "decode", batch, context, 1) for context in contexts]
    points += [_point(setting, "prefill", 1, context, chunk) for context in contexts]
    return {
        "model": setting.name,
        "chip": setting.chip.name,
        "num_chips": setting.tp,
        "ridge": setting.ridge,
        "peak_flops": setting.flops_per_s,
        "peak_bytes_per_s": setting.bytes_per_s,
        "num_parameters": setting.config.num_parameters,
        "weight_bytes": setting.weight_bytes,
        "kv_bytes_per_token": setting.kv_token_bytes,
        "crossing_tokens": crossing_tokens(setting.weight_bytes, setting.kv_token_bytes),
        "points": points,
    }


def _point(setting: Setting, phase: str, batch: int, context: int, queries: int) -> dict[str, Any]:
    tokens = batch * queries
    model = model_cost(
        setting.config, weight_dtype=setting.weight_dtype, kv_dtype=setting.kv_dtype, kv_copies=setting.kv_copies
    )
    touched = 1 - (1 - model.experts_touched) ** tokens
    weight_bytes = setting.weight_bytes - model.expert_bytes * (1 - touched)
    active = active_parameters(setting.config)
    linear = linear_cost(active, weight_bytes, setting.kv_token_bytes, tokens=tokens, cached=batch * context)
    kv_length = context if phase == "decode" else context + queries
    full = iteration_cost(model, [(queries, kv_length)] * batch)
    seconds = step_seconds(
        tokens=tokens,
        kv_bytes=setting.kv_token_bytes * batch * context,
        parameters=active,
        weight_bytes=weight_bytes,
        flops_per_s=setting.flops_per_s,
        bytes_per_s=setting.bytes_per_s,
    )
    used = setting.weight_bytes + setting.kv_token_bytes * batch * kv_length
    point = {"phase": phase, "batch": batch, "context": context, "chunk": queries, **_figures(linear, seconds, setting)}
    point["with_attention"] = _figures(full, full.seconds(setting.flops_per_s, setting.bytes_per_s), setting)
    point["fits"] = setting.chip.memory is None or used <= setting.tp * setting.chip.memory
    if setting.chip.interconnect:
        point["collectives_ms"] = 1e3 * _collective_seconds(setting, tokens)
    return point


def _figures(cost: Cost, seconds: float, setting: Setting) -> dict[str, Any]:
    return {
        "flops": cost.flops,
        "bytes": cost.bytes,
        "intensity": cost.intensity,
        "bound": cost.bound(setting.ridge),
        "time_ms": 1e3 * seconds,
    }


def _collective_seconds(setting: Setting, tokens: int) -> float:
    """Two all-reduces of `[T, D]` in bfloat16 per block, over one axis of the torus."""
    cfg, interconnect = setting.config, setting.chip.interconnect
    assert interconnect is not None
    each = all_reduce_seconds(tokens * cfg.hidden_size * 2, interconnect, num_devices=setting.tp)
    return 2 * cfg.num_layers * each


def format_table(report: dict[str, Any], title: str) -> str:
    """For a person: what was asked, the ridge, and a line per point."""
    chips = f"{report['num_chips']} x {title}" if report["num_chips"] > 1 else title
    lines = [
        f"{report['model']}: {report['num_parameters'] / 1e9:.3f} B parameters, {report['weight_bytes'] / 1e9:.2f} GB, "
        f"{report['kv_bytes_per_token'] / 1e3:.1f} kB of keys and values per token",
        f"{chips}: {report['peak_flops'] / 1e12:,.4g} TFLOP/s, {report['peak_bytes_per_s'] / 1e12:.4g} TB/s, "
        f"ridge at {report['ridge']:.0f} FLOP/byte",
        f"keys and values outweigh the weights beyond {report['crossing_tokens']:,.0f} tokens (context x batch)",
        "",
        f"{'':<38}{'2 FLOP per parameter and token':^43}{'with attention':^25}".rstrip(),
        f"{'phase':<9}{'batch':>6}{'chunk':>7}{'context':>10}{'':6}{'TFLOP':>8} {'GB':>8} {'FLOP/B':>7} {'bound':>7} "
        f"{'ms':>8} {'FLOP/B':>8} {'bound':>7} {'ms':>8}",
    ]
    lines += [_line(point) for point in report["points"]]
    if any(not point["fits"] for point in report["points"]):
        lines.append("* more than the memory of the chips: weights and cache together")
    if report["num_chips"] > 1 and "collectives_ms" in report["points"][0]:
        low, high = (f(p["collectives_ms"] for p in report["points"]) for f in (min, max))
        lines.append(f"two all-reduces per block, not overlapped, would add {low:.2f} to {high:.2f} ms")
    return "\n".join(lines)


def _line(point: dict[str, Any]) -> str:
    full = point["with_attention"]
    return (
        f"{point['phase']:<9}{point['batch']:>6}{point['chunk']:>7}{point['context']:>10,}"
        f"{'' if point['fits'] else ' *':<6}{_digits(point['flops'] / 1e12):>8} {_digits(point['bytes'] / 1e9):>8} "
        f"{_digits(point['intensity']):>7} {point['bound']:>7} {_digits(point['time_ms']):>8} "
        f"{_digits(full['intensity']):>8} {full['bound']:>7} {_digits(full['time_ms']):>8}"
    )


def _digits(value: float) -> str:
    """Three significant digits, never an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.3g}"
