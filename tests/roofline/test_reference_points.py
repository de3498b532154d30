"""The reference points of the roofline lectures, by their own formulas.

They were computed in one's head: 7 B parameters, half a megabyte of keys and values per token, k = 1000. The
first tests feed these round numbers and ask for the published figures; the others pin what exact arithmetic on
the real configurations gives, and how far that is from the published figures.
"""

from __future__ import annotations

import pytest

from jaxllm.families.presets import model_config
from jaxllm.roofline.chips import CHIPS
from jaxllm.roofline.cost_model import crossing_tokens, linear_cost, step_seconds
from jaxllm.roofline.report import Setting, roofline

K, M = 1000, 1000_000
DECODE = {1: 15, 4: 5.7, 16: 1.7, 64: 0.4}  # batch 32, thousands of tokens -> FLOP/byte
PREFILL = {4: 1800, 64: 620, 256: 200, 1000: 55}  # chunk 2048 on a prefix
V5E_MS = {1: 4.98, 8: 12.13, 16: 20.30, 32: 36.65}  # Llama-2-13B on 8 x v5e at 8k


def two_digits(value: float) -> float:
    return float(f"{value:.2g}")


@pytest.mark.parametrize(("context", "published"), DECODE.items())
def test_decode_intensity_of_llama_2_7b_in_round_numbers(context: int, published: float) -> None:
    cost = linear_cost(7e9, 14e9, 5e5, tokens=32, cached=32 * context * K)
    assert cost.intensity == pytest.approx(published, rel=0.08)  # the published ones have one or two digits
    assert round(cost.intensity, 1 if published < 10 else 0) == pytest.approx(published)


@pytest.mark.parametrize(("prefix", "published"), PREFILL.items())
def test_prefill_intensity_of_llama_2_7b_in_round_numbers(prefix: int, published: float) -> None:
    cost = linear_cost(7e9, 14e9, 5e5, tokens=2048, cached=prefix * K)
    assert two_digits(cost.intensity) == pytest.approx(published, rel=0.02)


def test_exact_intensities_of_llama_2_7b_on_an_h100() -> None:
    setting = Setting(name="llama-2-7b", config=model_config("llama-2-7b"), chip=CHIPS["h100"])
    contexts = [1 << 10, 4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20]
    points = roofline(setting, batch=32, contexts=contexts, chunk=2048)["points"]
    decode = [p["intensity"] for p in points if p["phase"] == "decode"]
    prefill = [p["intensity"] for p in points if p["phase"] == "prefill"]
    assert decode[:4] == pytest.approx([14.07, 5.246, 1.495, 0.3874], rel=1e-3)
    assert [prefill[i] for i in (1, 3, 4, 5)] == pytest.approx([1766, 576.9, 182.9, 49.00], rel=1e-3)
    # Binary k, 524,288 bytes per token and 6.74 B parameters: 2 to 13 percent below the published figures.
    published = [*DECODE.values(), *PREFILL.values()]
    for exact, rounded in zip([*decode[:4], *(prefill[i] for i in (1, 3, 4, 5))], published, strict=True):
        assert 0.87 < exact / rounded < 1


def test_verdicts_at_the_published_sustained_ridge() -> None:
    """R = 150 (half of the data sheet's 296): decode far below, prefill above until the prefix reaches 1M."""
    assert CHIPS["h100"].ridge == pytest.approx(295.5, abs=0.1)
    decode = [linear_cost(7e9, 14e9, 5e5, tokens=32, cached=32 * c * K).bound(150) for c in DECODE]
    prefill = [linear_cost(7e9, 14e9, 5e5, tokens=2048, cached=c * K).bound(150) for c in PREFILL]
    assert decode == ["memory"] * 4
    assert prefill == ["compute", "compute", "compute", "memory"]


def test_keys_and_values_outweigh_the_weights_of_llama_2_7b_at_about_27k_tokens() -> None:
    config = model_config("llama-2-7b")
    assert config.num_parameters == 6_738_415_616
    assert config.kv_bytes_per_token(2) == 524_288
    assert crossing_tokens(2 * 7e9, 524_288) == pytest.approx(27_000, rel=0.02)  # 26,703: as published
    assert crossing_tokens(2 * config.num_parameters, 524_288) == pytest.approx(25_705, abs=1)


@pytest.mark.parametrize(("batch", "published"), V5E_MS.items())
def test_step_time_of_llama_2_13b_on_eight_v5e_in_round_numbers(batch: int, published: float) -> None:
    """13 B parameters, 6.7 GB of keys and values per request at 8k, 0.82 TB/s per chip (then on the data sheet)."""
    seconds = step_seconds(
        tokens=batch,
        kv_bytes=batch * 6.7e9,
        parameters=13e9,
        weight_bytes=26e9,
        flops_per_s=8 * 197e12,
        bytes_per_s=8 * 0.82e12,
    )
    assert 1e3 * seconds == pytest.approx(published, abs=0.006)  # 4.985 and 20.305 were cut, not rounded


@pytest.mark.parametrize(("batch", "exact"), {1: 4.998, 8: 12.167, 16: 20.361, 32: 36.749}.items())
def test_step_time_of_llama_2_13b_on_eight_v5e_with_the_chip_table(batch: int, exact: float) -> None:
    setting = Setting(name="llama-2-13b", config=model_config("llama-2-13b"), chip=CHIPS["v5e"], tp=8)
    point = roofline(setting, batch=batch, contexts=[8192], chunk=2048)["points"][0]
    assert point["time_ms"] == pytest.approx(exact, abs=2e-3)
    assert point["time_ms"] == pytest.approx(V5E_MS[batch], rel=0.01)
    assert point["bound"] == "memory"
