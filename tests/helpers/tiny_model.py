"""A random two-layer Llama with a byte tokenizer, as a Hugging Face folder written by transformers.

For tests that need a model but not its wisdom: it starts in no time and says nothing sensible.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.helpers.byte_tokenizer import BOS_ID, EOS_ID, VOCAB_SIZE, write_byte_tokenizer

HIDDEN, HEADS, KV_HEADS, MAX_LEN = 64, 4, 2, 16384


def write_tiny_model(folder: Path, *, num_layers: int = 2, family: str = "Llama", **overrides: Any) -> Path:
    """Write config, float32 weights (seed 0) and tokenizer into `folder` and return it.

    Weights are large enough that greedy answers are not one token repeated. `overrides` are fields of the family's
    configuration.
    """
    import torch
    import transformers

    torch.manual_seed(0)
    settings = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": num_layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": MAX_LEN,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "initializer_range": 0.2,
        "dtype": "float32",
    }
    config = getattr(transformers, f"{family}Config")(**settings | overrides)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    model.save_pretrained(folder)
    return write_byte_tokenizer(folder)
