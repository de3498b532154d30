"""A tiny random Llama in a Hugging Face folder with the byte tokenizer: an engine starts on it in a second.

Random weights, so its greedy text is nonsense but reproducible, and hardly ever ends by itself.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tests.helpers.byte_tokenizer import BOS_ID, EOS_ID, VOCAB_SIZE, write_byte_tokenizer

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
}


def write_tiny_llama(folder: Path, *, seed: int = 0) -> Path:
    """Write config, weights and tokenizer into `folder` (made when missing) and return it."""
    write_byte_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    save_file(_weights(np.random.default_rng(seed)), folder / "model.safetensors")
    return folder


def _weights(rng: np.random.Generator) -> dict[str, np.ndarray]:
    d, f, h = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["head_dim"]
    q, kv, vocab = CONFIG["num_attention_heads"] * h, CONFIG["num_key_value_heads"] * h, CONFIG["vocab_size"]

    def matrix(*shape: int) -> np.ndarray:
        return rng.normal(0, 1.5 / shape[-1] ** 0.5, shape).astype(np.float32)

    head = matrix(vocab, d)
    head[EOS_ID] = 0.0  # hardly ever the likeliest
    weights = {"model.embed_tokens.weight": matrix(vocab, d), "lm_head.weight": head}
    weights["model.norm.weight"] = np.ones(d, np.float32)
    for i in range(CONFIG["num_hidden_layers"]):
        prefix = f"model.layers.{i}"
        shapes = {"q_proj": (q, d), "k_proj": (kv, d), "v_proj": (kv, d), "o_proj": (d, q)}
        weights |= {f"{prefix}.self_attn.{name}.weight": matrix(*shape) for name, shape in shapes.items()}
        shapes = {"gate_proj": (f, d), "up_proj": (f, d), "down_proj": (d, f)}
        weights |= {f"{prefix}.mlp.{name}.weight": matrix(*shape) for name, shape in shapes.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{prefix}.{norm}.weight"] = np.ones(d, np.float32)
    return weights
