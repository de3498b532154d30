"""FLOPs and bytes of an iteration against counting by hand, and the times of collectives."""

from __future__ import annotations

import dataclasses

import pytest

from jaxllm.config import ModelConfig
from jaxllm.families.presets import model_config
from jaxllm.roofline.chips import CHIPS, Node, Torus, chip_of_device, find_chip, measure_device
from jaxllm.roofline.collective_time import (
    all_gather_seconds,
    all_reduce_seconds,
    all_to_all_seconds,
    reduce_scatter_seconds,
)
from jaxllm.roofline.cost_model import Cost, ModelCost, iteration_cost, model_cost, step_seconds

TINY = ModelConfig(
    vocab_size=10,
    hidden_size=4,
    intermediate_size=6,
    num_layers=3,
    num_heads=2,
    num_kv_heads=1,
    head_dim=2,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    max_position_embeddings=64,
    tie_word_embeddings=False,
)


def test_tiny_model_counted_by_hand() -> None:
    block = 4 * 2 * (2 + 2) + 2 * 2 * 4 + 3 * 4 * 6 + 2 * 4  # qkv, out, FFN, norms
    matrices = 3 * block + 4  # and the final norm
    cost = iteration_cost(model_cost(TINY), [(2, 5), (1, 3)])
    pairs = (4 + 5) + 3
    assert cost.flops == 2 * matrices * 3 + 2 * 10 * 4 * 2 + 3 * pairs * 4 * 2 * 2
    kv_token = 3 * 2 * 1 * 2 * 2  # layers, keys and values, heads, width, bytes
    assert cost.bytes == 2 * (matrices + 10 * 4) + 2 * 4 * 3 + kv_token * (5 + 3)


def test_head_is_read_only_where_a_row_samples() -> None:
    model = model_cost(TINY)
    silent, one = (iteration_cost(model, [(4, 4)], samples=n) for n in (0, 1))
    assert one.flops - silent.flops == 2 * 10 * 4
    assert one.bytes - silent.bytes == 2 * 10 * 4


def test_chunks_of_a_prompt_make_the_pairs_of_the_whole_and_read_the_cache_again() -> None:
    model = model_cost(TINY)
    whole = model.attended([(48, 48)])
    chunks = [model.attended([(16, end)]) for end in (16, 32, 48)]
    assert sum(pairs for pairs, _ in chunks) == whole[0] == 3 * 48 * 49 // 2
    assert sum(keys for _, keys in chunks) == 3 * (16 + 32 + 48)


@pytest.mark.parametrize("window", [1, 4, 7, 100])
def test_windows_agree_with_counting(window: int) -> None:
    model = dataclasses.replace(model_cost(TINY), attention=((None, 1), (window, 2)))
    for queries, kv in [(1, 1), (1, 9), (3, 9), (9, 9), (5, 6)]:
        seen = [range(max(0, end - window), end) for end in range(kv - queries + 1, kv + 1)]
        full = sum(range(kv - queries + 1, kv + 1))
        pairs, keys = model.attended([(queries, kv)])
        assert pairs == full + 2 * sum(map(len, seen))
        assert keys == kv + 2 * len(set().union(*seen))


def test_kv_copies_and_dtypes_are_counted() -> None:
    base, copied = model_cost(TINY), model_cost(TINY, kv_copies=2, kv_dtype="float32")
    assert copied.kv_bytes == 4 * base.kv_bytes
    assert copied.block_bytes == base.block_bytes
    eight = model_cost(TINY, weight_dtype="int8")
    assert (eight.block_bytes, eight.token_flops) == (base.block_bytes / 2, base.token_flops)


def test_experts_are_read_as_far_as_tokens_are_sent_to_them() -> None:
    model = ModelCost(
        token_flops=2,
        head_flops=0,
        pair_flops=0,
        block_bytes=10,
        head_bytes=0,
        embedding_row_bytes=0,
        kv_bytes=0,
        attention=((None, 1),),
        expert_bytes=800,
        experts_touched=2 / 8,
    )
    assert iteration_cost(model, [(1, 1)]).bytes == 10 + 200
    assert iteration_cost(model, [(1, 1)] * 8).bytes == pytest.approx(10 + 800 * (1 - 0.75**8))
    two_passes = model.cost(tokens=16, samples=0, pairs=0, keys=0, passes=2)
    assert two_passes.bytes == pytest.approx(2 * (10 + 800 * (1 - 0.75**8)))


def test_impossible_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="5 query tokens and 4 keys"):
        iteration_cost(model_cost(TINY), [(5, 4)])


def test_bounds() -> None:
    assert Cost(100, 10).bound(9) == "compute"
    assert Cost(100, 10).bound(11) == "memory"
    assert Cost(100, 10).seconds(50, 1) == 10
    small = step_seconds(tokens=1, kv_bytes=30, parameters=5, weight_bytes=10, flops_per_s=1e9, bytes_per_s=10)
    assert small == (30 + 10) / 10
    large = step_seconds(tokens=100, kv_bytes=30, parameters=5, weight_bytes=10, flops_per_s=10, bytes_per_s=10)
    assert large == 30 / 10 + 2 * 100 * 5 / 10


def test_collectives_on_a_torus() -> None:
    ici = CHIPS["v5e"].interconnect
    assert isinstance(ici, Torus)
    gather = all_gather_seconds(9e9, ici, num_devices=4)
    assert gather == pytest.approx(9e9 / 90e9)  # 45 GB/s each way, both ways
    assert all_gather_seconds(9e9, ici, num_devices=16, axes=2) == pytest.approx(gather / 2)
    assert reduce_scatter_seconds(9e9, ici, num_devices=4) == gather
    assert all_reduce_seconds(9e9, ici, num_devices=4) == 2 * gather
    assert all_to_all_seconds(9e9, ici, num_devices=4) == gather / 4
    with pytest.raises(ValueError, match="axes=3; this torus has 2"):
        all_gather_seconds(1, ici, num_devices=4, axes=3)


def test_collectives_in_a_node() -> None:
    nvlink = CHIPS["h100"].interconnect
    assert isinstance(nvlink, Node)
    gather = all_gather_seconds(9e9, nvlink, num_devices=8)
    assert gather == pytest.approx(9e9 * 7 / (8 * 450e9))
    assert reduce_scatter_seconds(9e9, nvlink, num_devices=8) == gather
    assert all_reduce_seconds(9e9, nvlink, num_devices=8) == 2 * gather
    assert all_to_all_seconds(9e9, nvlink, num_devices=8) == gather / 8
    assert all_reduce_seconds(9e9, nvlink, num_devices=1) == 0


def test_chips_by_name_and_by_device() -> None:
    assert find_chip("H100") is find_chip("nvidia-h100-sxm") is CHIPS["h100"]
    assert find_chip("tpu-v5e") is CHIPS["v5e"]
    with pytest.raises(ValueError, match="no chip 'h300'; use one of v4, v5e"):
        find_chip("h300")
    assert chip_of_device("TPU v5 lite") is CHIPS["v5e"]
    assert chip_of_device("TPU v5p") is chip_of_device("TPU v5") is CHIPS["v5p"]
    assert chip_of_device("NVIDIA H100 80GB HBM3") is CHIPS["h100"]
    assert chip_of_device("NVIDIA H100 PCIe") is None
    assert chip_of_device("cpu") is None


def test_the_host_is_measured() -> None:
    chip = measure_device()
    assert chip.name == "cpu"
    assert 1e8 < chip.bandwidth < 1e13
    assert 1e8 < chip.flops < 1e15


def test_presets_have_the_published_sizes() -> None:
    assert model_config("llama-2-7b").num_parameters == 6_738_415_616
    assert model_config("llama-2-13b").num_parameters == 13_015_864_320
