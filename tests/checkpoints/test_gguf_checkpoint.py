"""A GGUF file looks like the Hugging Face checkpoint it was converted from."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from jaxllm.checkpoints import CheckpointError, open_checkpoint

L, D, N, K, H, F, V = 2, 64, 4, 2, 16, 96, 40  # as conftest.py writes them
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def reference(path: Path) -> dict[str, np.ndarray]:
    """Every tensor as the `gguf` package reads it, by GGUF name, in float32."""
    tensors = {}
    for tensor in gguf.GGUFReader(path).tensors:
        shape = tuple(int(n) for n in tensor.shape[::-1])
        tensors[tensor.name] = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
    return tensors


def unpermute(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Row by row: dimension j of a head is at 2j in the file, its partner j + H/2 at 2j + 1."""
    head_dim = len(weight) // num_heads
    rows = []
    for head in range(num_heads):
        for dim in range(head_dim):
            half, j = divmod(dim, head_dim // 2)
            rows.append(weight[head * head_dim + 2 * j + half])
    return np.stack(rows)


def expected_tensors(path: Path, *, permuted: bool = True) -> dict[str, np.ndarray]:
    source = reference(path)
    tensors = {
        "model.embed_tokens.weight": source["token_embd.weight"],
        "model.norm.weight": source["output_norm.weight"],
    }
    for layer in range(L):
        for hf, stem in LAYER_NAMES.items():
            weight = source[f"blk.{layer}.{stem}.weight"]
            if permuted and stem in ("attn_q", "attn_k"):
                weight = unpermute(weight, N if stem == "attn_q" else K)
            tensors[f"model.layers.{layer}.{hf}.weight"] = weight
    return tensors


def test_tensors_are_those_of_the_gguf_package_in_hugging_face_names_and_order(tiny_gguf: Path) -> None:
    checkpoint = open_checkpoint(tiny_gguf)
    expected = expected_tensors(tiny_gguf)
    assert checkpoint.tensors.keys() == expected.keys()
    for name, value in expected.items():
        got, info = checkpoint.read(name), checkpoint.tensors[name]
        assert (got.shape, got.dtype.name) == (info.shape, info.dtype)
        np.testing.assert_array_equal(got.astype(np.float32), value, err_msg=name)
    dtypes = {info.dtype for info in checkpoint.tensors.values()}
    assert dtypes == {"float32", "float16", "bfloat16"}


SLICES = [
    (slice(3, 20),),
    (slice(None), slice(8, 40)),
    (slice(16, 32), slice(1, 64, 2)),
    (slice(5, 5),),
    (slice(-3, None), slice(None)),
    (),
]


@pytest.mark.parametrize("index", SLICES, ids=str)
def test_slice_is_the_same_part_of_the_whole(tiny_gguf: Path, index: tuple[slice, ...]) -> None:
    checkpoint = open_checkpoint(tiny_gguf)
    for name in checkpoint.tensors:
        part_index = index[: len(checkpoint.tensors[name].shape)]
        np.testing.assert_array_equal(
            checkpoint.read(name, part_index), checkpoint.read(name)[part_index], err_msg=name
        )


def test_slice_dequantises_only_its_rows(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(tiny_gguf)
    seen: list[int] = []
    original = gguf.quants.dequantize
    monkeypatch.setattr(gguf.quants, "dequantize", lambda rows, kind: seen.append(len(rows)) or original(rows, kind))
    quantised = [
        tensor.name
        for tensor in gguf.GGUFReader(tiny_gguf).tensors
        if tensor.tensor_type.name.startswith("Q") and "attn_q" in tensor.name
    ]
    assert quantised
    for name in quantised:
        layer = name.split(".")[1]
        checkpoint.read(f"model.layers.{layer}.self_attn.q_proj.weight", (slice(4, 9),))
    assert seen == [5] * len(quantised)


def test_plain_tensor_is_a_read_only_view_of_the_file(tiny_gguf: Path) -> None:
    checkpoint = open_checkpoint(tiny_gguf)
    weight = checkpoint.read("model.norm.weight")
    assert not weight.flags.owndata
    assert not weight.flags.writeable


def test_config_has_hugging_face_keys(tiny_gguf: Path) -> None:
    checkpoint = open_checkpoint(tiny_gguf)
    assert checkpoint.config == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": V,
        "hidden_act": "silu",
        "num_hidden_layers": L,
        "max_position_embeddings": 128,
        "hidden_size": D,
        "intermediate_size": F,
        "num_attention_heads": N,
        "num_key_value_heads": K,
        "head_dim": H,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
    }
    assert checkpoint.generation_config == {}


def test_output_tensor_means_untied_embeddings(make_gguf: Callable[..., Path]) -> None:
    weight = np.ones((V, D), np.float32)
    checkpoint = open_checkpoint(make_gguf(extra={"output.weight": weight}))
    assert checkpoint.config["tie_word_embeddings"] is False
    np.testing.assert_array_equal(checkpoint.read("lm_head.weight").astype(np.float32), weight)


def test_permuted_bias_of_a_llama_is_put_in_order(make_gguf: Callable[..., Path]) -> None:
    bias = np.arange(K * H, dtype=np.float32)
    extra = {"blk.0.attn_q.bias": np.arange(N * H, dtype=np.float32), "blk.0.attn_k.bias": bias}
    checkpoint = open_checkpoint(make_gguf(extra=extra))
    assert checkpoint.config["attention_bias"] is True
    got = checkpoint.read("model.layers.0.self_attn.k_proj.bias")
    np.testing.assert_array_equal(got, unpermute(bias, K))
    assert got.tolist() != bias.tolist()


@pytest.mark.parametrize("arch", ["qwen2", "qwen3"])
def test_qwen_rows_are_not_permuted(make_gguf: Callable[..., Path], arch: str) -> None:
    extra = {
        "qwen2": {"blk.0.attn_q.bias": np.arange(N * H, dtype=np.float32)},
        "qwen3": {"blk.0.attn_q_norm.weight": np.ones(H, np.float32)},
    }[arch]
    path = make_gguf(arch=arch, extra=extra, metadata={"attention.key_length": H})
    checkpoint = open_checkpoint(path)
    expected = expected_tensors(path, permuted=False)
    (new,) = checkpoint.tensors.keys() - expected.keys()
    assert (
        new
        == {
            "qwen2": "model.layers.0.self_attn.q_proj.bias",
            "qwen3": "model.layers.0.self_attn.q_norm.weight",
        }[arch]
    )
    np.testing.assert_array_equal(checkpoint.read(new), next(iter(extra.values())))
    for name, value in expected.items():
        np.testing.assert_array_equal(checkpoint.read(name).astype(np.float32), value, err_msg=name)
    assert checkpoint.config["model_type"] == arch
    assert checkpoint.config["head_dim"] == H


def llama3_factors(factor: float) -> np.ndarray:
    """The divisors of the rotary frequencies, one at a time, as Llama 3.1 publishes the rule."""
    factors = []
    for i in range(H // 2):
        wavelength = 2 * math.pi * 500000.0 ** (2 * i / H)
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192:
            factors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / 3
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


def test_llama3_rope_factors_become_rope_scaling(make_gguf: Callable[..., Path]) -> None:
    factors = llama3_factors(32.0)
    assert len({*factors.tolist()}) > 2  # one of the three branches each
    path = make_gguf(metadata={"rope.freq_base": 500000.0}, extra={"rope_freqs.weight": factors})
    checkpoint = open_checkpoint(path)
    assert checkpoint.config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert "rope_freqs.weight" not in checkpoint.tensors


def test_other_rope_factors_are_kept_as_they_are(make_gguf: Callable[..., Path]) -> None:
    factors = llama3_factors(32.0)
    factors[3] *= 1.1
    path = make_gguf(metadata={"rope.freq_base": 500000.0}, extra={"rope_freqs.weight": factors})
    scaling = open_checkpoint(path).config["rope_scaling"]
    assert scaling["rope_type"] == "longrope"
    assert scaling["attention_factor"] == 1.0
    np.testing.assert_array_equal(np.float32(scaling["short_factor"]), factors)
    np.testing.assert_array_equal(np.float32(scaling["long_factor"]), factors)


@pytest.mark.parametrize("factors", [np.ones(3, np.float32), np.zeros(H // 2, np.float32)])
def test_rope_factors_that_make_no_sense_are_refused_by_name(
    make_gguf: Callable[..., Path], factors: np.ndarray
) -> None:
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight"):
        open_checkpoint(make_gguf(extra={"rope_freqs.weight": factors}))


def test_rope_scaling_of_the_metadata_is_translated(make_gguf: Callable[..., Path]) -> None:
    yarn = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 64,
    }
    assert open_checkpoint(make_gguf(metadata=yarn)).config["rope_scaling"] == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    }


YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64}
NEUTRAL = {
    "of the whole file": {"vocab_size": V, "tensor_data_layout": "Meta AI original pth", "pooling_type": 3},
    "switched off": {
        "expert_count": 0,
        "expert_used_count": 0,
        "attention.causal": True,
        "attention.clamp_kqv": 0.0,
        "final_logit_softcapping": 0.0,
        "logit_scale": 1.0,
        "residual_scale": 1.0,
        "embedding_scale": 1.0,
        "attention.scale": H**-0.5,
        "attention.sliding_window": 128,
        "rope.scaling.finetuned": False,
        "leading_dense_block_count": 0,
        "use_parallel_residual": False,
    },
    "said twice": {"rope.dimension_count": H, "attention.key_length": H, "attention.value_length": H},
    "for each layer": {"attention.head_count": [N, N], "feed_forward_length": [F, F]},
    "no scaling": {"rope.scaling.type": "none", "rope.scaling.factor": 4.0},
    "scaling by one": {"rope.scaling.type": "linear", "rope.scaling.factor": 1.0},
    "not read there": {"rope.freq_base_swa": 5.0, "ssm.conv_kernel": 4, "some.key": "of tomorrow"},
}


@pytest.mark.parametrize("metadata", NEUTRAL.values(), ids=NEUTRAL)
def test_metadata_that_changes_nothing_is_accepted(make_gguf: Callable[..., Path], metadata: dict) -> None:
    plain = open_checkpoint(make_gguf()).config
    assert open_checkpoint(make_gguf(metadata=metadata)).config == plain


def test_metadata_without_effect_is_named_in_one_log_line(
    make_gguf: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "jaxllm"):
        open_checkpoint(make_gguf(metadata={"some.key": 1, "other": 2.0, "vocab_size": V}))
    assert [record.message for record in caplog.records] == [
        "GGUF metadata without effect on a llama model: other, some.key"
    ]


SCALED = {
    "yarn with its usual borders": (
        YARN | {"rope.scaling.yarn_beta_fast": 32.0, "rope.scaling.yarn_beta_slow": 1.0},
        {"beta_fast": 32.0, "beta_slow": 1.0},
    ),
    "yarn with neutral factors": (
        YARN
        | {"rope.scaling.yarn_ext_factor": 1.0, "rope.scaling.yarn_attn_factor": 1.0, "rope.scaling.attn_factor": 1.0},
        {},
    ),
    "yarn with a magnitude": (YARN | {"rope.scaling.yarn_attn_factor": 1.5}, {"attention_factor": 1.5}),
    "linear, without a type": ({"rope.scaling.factor": 2.0}, {"rope_type": "linear", "factor": 2.0}),
    "linear, as in 2023": ({"rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
}


@pytest.mark.parametrize(("metadata", "expected"), SCALED.values(), ids=SCALED)
def test_rope_scaling_in_every_spelling(make_gguf: Callable[..., Path], metadata: dict, expected: dict) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    is_yarn = "rope.scaling.type" in metadata
    got = open_checkpoint(make_gguf(metadata=metadata)).config["rope_scaling"]
    assert got == (yarn if is_yarn else {}) | expected


def test_blocks_that_predict_further_tokens_are_left_out(make_gguf: Callable[..., Path]) -> None:
    extra = {"blk.2.attn_norm.weight": np.ones(D, np.float32), "blk.2.nextn.enorm.weight": np.ones(D, np.float32)}
    path = make_gguf(metadata={"block_count": 3, "nextn_predict_layers": 1}, extra=extra)
    checkpoint = open_checkpoint(path)
    assert checkpoint.config["num_hidden_layers"] == L
    assert not any("layers.2." in name for name in checkpoint.tensors)


def test_biases_that_only_some_projections_have_are_zero_in_the_others(make_gguf: Callable[..., Path]) -> None:
    extra = {f"blk.{i}.attn_q.bias": np.ones(N * H, np.float32) for i in range(L)}
    checkpoint = open_checkpoint(make_gguf(extra=extra))
    assert checkpoint.config["attention_bias"] is True
    bias = checkpoint.read("model.layers.1.self_attn.o_proj.bias")
    assert (bias.shape, bias.any()) == ((D,), False)


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_queries_keys_and_values_in_one_tensor_are_taken_apart(
    make_gguf: Callable[..., Path], tmp_path: Path, arch: str
) -> None:
    separate = open_checkpoint(make_gguf(arch=arch).rename(tmp_path / "separate.gguf"))
    source = reference(tmp_path / "separate.gguf")
    names = [[f"blk.{i}.attn_{letter}.weight" for letter in "qkv"] for i in range(L)]
    fused = {f"blk.{i}.attn_qkv.weight": np.concatenate([source[n] for n in names[i]]) for i in range(L)}
    together = open_checkpoint(make_gguf(arch=arch, extra=fused, without=tuple(n for row in names for n in row)))
    assert together.tensors.keys() == separate.tensors.keys()
    for letter in "qkv":
        name = f"model.layers.1.self_attn.{letter}_proj.weight"
        # The tensors are stored in different types; what is compared is which row is which.
        got, expected = together.read(name).astype(np.float32), separate.read(name).astype(np.float32)
        np.testing.assert_allclose(got, expected, atol=0.4)
        np.testing.assert_array_equal(together.read(name, (slice(2, 7),)).astype(np.float32), got[2:7])


REFUSED = {
    "experts": ({"metadata": {"expert_count": 8}}, "expert_count=8"),
    "scaled logits": ({"metadata": {"logit_scale": 2.0}}, "logit_scale=2.0"),
    "clamped projections": ({"metadata": {"attention.clamp_kqv": 8.0}}, "attention.clamp_kqv=8.0"),
    "no mask": ({"metadata": {"attention.causal": False}}, "attention.causal=False"),
    "other score scale": ({"metadata": {"attention.scale": 0.5}}, "attention.scale=0.5"),
    "a window in this family": ({"metadata": {"attention.sliding_window": 16}}, "attention.sliding_window=16"),
    "unknown rope scaling": ({"metadata": {"rope.scaling.type": "longrope"}}, "longrope"),
    "rope scaling nobody knows": ({"metadata": {"rope.scaling.type": "spiral"}}, "spiral"),
    "half a yarn": ({"metadata": YARN | {"rope.scaling.yarn_ext_factor": 0.5}}, "yarn_ext_factor=0.5"),
    "metadata of another type": ({"metadata": {"rope.freq_base": "high"}}, "rope.freq_base='high'"),
    "experts without a number": ({"metadata": {"expert_count": 4, "expert_used_count": "two"}}, "expert_used_count"),
    "expert of a dense model": (
        {"extra": {"blk.0.ffn_gate_exps.weight": np.ones((4, F, D), np.float32)}},
        "blk.0.ffn_gate_exps.weight",
    ),
    "partial rotary": ({"metadata": {"rope.dimension_count": 8}}, "rope.dimension_count=8"),
    "other value dimension": ({"metadata": {"attention.value_length": 8}}, "attention.value_length=8"),
    "no layers": ({"metadata": {"block_count": None}}, "no 'block_count'"),
    "missing blocks": ({"metadata": {"block_count": 3}}, "block_count=3"),
    "heads differ by layer": ({"metadata": {"attention.head_count": [4, 2]}}, "attention.head_count"),
    "heads do not divide": ({"metadata": {"attention.head_count_kv": 3}}, "3 KV heads"),
    "epsilon missing": ({"metadata": {"attention.layer_norm_rms_epsilon": None}}, "rms_epsilon=None"),
    "epsilon not finite": ({"metadata": {"attention.layer_norm_rms_epsilon": math.nan}}, "rms_epsilon=nan"),
    "no embedding": ({"without": ("token_embd.weight",)}, "token_embd.weight"),
    "unknown tensor": (
        {"extra": {"blk.0.ssm_in.weight": np.ones((D, D), np.float32)}},
        "blk.0.ssm_in.weight",
    ),
    "same layer twice": (
        {"extra": {"blk.00.attn_norm.weight": np.ones(D, np.float32)}},
        "blk.00.attn_norm.weight",
    ),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_computed_is_refused_by_name(
    make_gguf: Callable[..., Path], changes: dict, message: str
) -> None:
    path = make_gguf(**changes)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_architecture_is_refused_with_those_supported(make_gguf: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match=r"'mamba'.*llama, qwen2, qwen3"):
        open_checkpoint(make_gguf(arch="mamba"))


def test_every_end_of_turn_token_is_in_the_generation_config(tmp_path: Path) -> None:
    from jaxllm.checkpoints.gguf.config import hf_generation_config

    metadata = {
        "tokenizer.ggml.eos_token_id": 7,
        "tokenizer.ggml.eot_token_id": 9,
        "tokenizer.ggml.eom_token_id": 7,
        "general.sampling.temp": float(np.float32(0.6)),
        "general.sampling.top_k": 20,
    }
    assert hf_generation_config(metadata) == {"eos_token_id": [7, 9], "temperature": 0.6, "top_k": 20}


def test_sampling_defaults_of_the_file_are_those_of_the_model() -> None:
    from jaxllm.checkpoints.gguf.config import hf_generation_config

    keys = {"temp": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.0, "penalty_repeat": 1.5, "mirostat": 1}
    metadata = {f"general.sampling.{key}": np.float32(v).item() for key, v in keys.items() if isinstance(v, float)}
    metadata["general.sampling.top_k"] = 20
    expected = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.0, "repetition_penalty": 1.5}
    assert hf_generation_config(metadata) == expected
    wrong = dict.fromkeys(metadata, "high") | {"tokenizer.ggml.eos_token_id": "end"}
    assert hf_generation_config(wrong) == {}
