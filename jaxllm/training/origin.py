"""Where a run begins: a model that there is, or one from scratch, with its tokenizer and its first parameters.

A `TrainConfig` -> an `Origin`. Knows nothing of data but the text that a tokenizer is made from.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.checkpoints import Checkpoint, resolve_model
from jaxllm.config import EngineConfig
from jaxllm.families.presets import PRESETS, hf_config
from jaxllm.tokenizer import ChatOptions, Tokenizer, load_tokenizer
from jaxllm.training.config import TrainConfig
from jaxllm.training.data.corpus import texts_of
from jaxllm.training.loss import name_of
from jaxllm.training.vocabulary import END, PAD, make_tokenizer
from jaxllm.weights.abstract import AbstractModel
from jaxllm.weights.source import ModelSource, open_source

_CONTEXT = 256  # of a model from scratch
_SPREAD = 0.02  # of matrices; those that add to the residual stream: divided by the square root of how many do
_INTO_RESIDUAL = ("out", "down")
_ALPACA = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'Below is an instruction that describes a task. Write a response that "
    "appropriately completes the request.\\n\\n### Instruction:\\n' + message['content'] + '\\n\\n### Response:\\n' }}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)
_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' "
    "+ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TEMPLATES = {"alpaca": _ALPACA, "chatml": _CHATML}


@dataclass(frozen=True, slots=True)
class Origin:
    """What a run starts from.

    Attributes:
        hf: the model's configuration, as its `config.json` will have it.
        tokenizer: None where the model has none.
        source: of its parameters; None from scratch.
    """

    hf: dict[str, Any]
    tokenizer: Tokenizer
    source: ModelSource | None

    @property
    def checkpoint(self) -> Checkpoint | None:
        """The files it came from."""
        return self.source.checkpoint if self.source else None

    def parameters(self, model: AbstractModel, seed: int) -> dict[str, jax.Array]:
        """Float32 values by name, in the model's shardings."""
        state = self.source.parameters(model) if self.source else initial_parameters(model, seed)
        return {name_of(path): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}


def find_origin(config: TrainConfig, text: Path) -> Origin:
    """Resolve the model, or invent one. Raises ValueError that says what to do."""
    origin = _from_model(config) if config.model else _from_scratch(config, text)
    if config.task == "sft" and origin.tokenizer.chat_template is None:
        origin.tokenizer.chat.configure(ChatOptions(template=_template(config, origin.tokenizer)))
    return origin


def _template(config: TrainConfig, tokenizer: Tokenizer) -> str:
    if config.template == "chatml" and not {"<|im_start|>", "<|im_end|>"} <= tokenizer.special_token_ids.keys():
        raise ValueError("template='chatml' needs a vocabulary with <|im_start|> and <|im_end|>; use alpaca")
    return TEMPLATES[config.template]


def _from_model(config: TrainConfig) -> Origin:
    assert config.model
    source = open_source(EngineConfig(model=config.model, seed=config.seed))
    assert source.path is not None
    return Origin(dict(source.hf_config), load_tokenizer(source.path), source)


def _from_scratch(config: TrainConfig, text: Path) -> Origin:
    kind = config.tokenizer or ("bpe:4096" if config.depth else "char")
    if kind in ("char", "byte") or kind.startswith("bpe"):
        tokenizer = make_tokenizer(kind, texts_of(text))
    else:
        tokenizer = load_tokenizer(resolve_model(kind))
    return Origin(_sizes(config, tokenizer), tokenizer, None)


def _sizes(config: TrainConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """The configuration in Hugging Face's words."""
    hf = _base(config.architecture)
    names = _GPT2 if hf["architectures"] == ["GPT2LMHeadModel"] else _COMMON
    length = max(config.context_length or _CONTEXT, hf.get(names["length"], 0) if config.architecture in PRESETS else 0)
    wanted = {"length": length, "vocab": tokenizer.vocab_size, **_shape(config, preset=names["hidden"] in hf)}
    special = {name: _id(tokenizer, text) for name, text in (("bos", END), ("eos", END), ("pad", PAD))}
    hf |= {names[key]: value for key, value in wanted.items() if key in names and value is not None}
    hf |= {f"{name}_token_id": number for name, number in special.items() if number is not None}
    return hf


_COMMON = {
    "length": "max_position_embeddings",
    "vocab": "vocab_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "hidden": "hidden_size",
    "ffn": "intermediate_size",
    "head_dim": "head_dim",
}
_GPT2 = {
    "length": "n_positions",
    "vocab": "vocab_size",
    "layers": "n_layer",
    "heads": "n_head",
    "hidden": "n_embd",
    "ffn": "n_inner",
}
_SMALL = {"rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True, "hidden_act": "silu"}
_BASES = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **_SMALL},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", **_SMALL},
    "gpt2": {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"},
    "mixtral": {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        **_SMALL,
    },
}


def _base(name: str) -> dict[str, Any]:
    if name in _BASES:
        return dict(_BASES[name])
    if name in PRESETS:
        return dict(hf_config(name))
    path = Path(name)
    if path.suffix == ".json" and path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    raise ValueError(f"architecture={name!r}; use {', '.join(_BASES)}, a preset's name or a config.json")


def _shape(config: TrainConfig, *, preset: bool) -> dict[str, int | None]:
    """Layers, heads and widths; a preset has its own but for what is said."""
    layers, heads, hidden = config.num_layers, config.num_heads, config.hidden_size
    if config.depth:
        layers, hidden = config.depth, 64 * config.depth
        heads = max(1, hidden // 64)
    elif not preset:
        layers, hidden = layers or 4, hidden or 128
        heads = heads or max(1, hidden // 32)
    if heads and hidden and hidden % heads:
        raise ValueError(f"hidden_size={hidden} does not divide by num_heads={heads}")
    ffn = config.intermediate_size
    if ffn is None and hidden:
        ffn = 4 * hidden if config.architecture == "gpt2" else -(-8 * hidden // 3 // 32) * 32
    head_dim = hidden // heads if heads and hidden else None
    return {
        "layers": layers,
        "heads": heads,
        "kv_heads": config.num_kv_heads or heads,
        "hidden": hidden,
        "ffn": ffn,
        "head_dim": head_dim,
    }


def _id(tokenizer: Tokenizer, text: str) -> int | None:
    name = {END: "eos_token", PAD: "pad_token"}[text]
    return tokenizer.special_token_ids.get(tokenizer.special_tokens.get(name, ""))


def initial_parameters(model: AbstractModel, seed: int) -> Any:
    """GPT-2's: normal with 0.02, less where a matrix adds to the residual stream; norms are one, biases zero.

    The values do not depend on the mesh: rows that only pad a table are drawn last and set to zero.
    """
    shardings = dict(nnx.to_flat_state(model.shardings()))
    narrow = _SPREAD / (2 * model.cfg.num_layers) ** 0.5
    key = jax.random.key(seed)

    def make(path: Any, variable: Any) -> Any:
        want, kind = variable.get_value(), str(path[-1])
        sharding = shardings[path].get_value()
        if kind == "scale" or kind.endswith("_norm"):
            value = jax.jit(lambda: jnp.ones(want.shape, want.dtype), out_shardings=sharding)()
        elif kind.endswith("bias") or kind in ("correction", "sinks"):
            value = jax.jit(lambda: jnp.zeros(want.shape, want.dtype), out_shardings=sharding)()
        else:
            rows = want.shape[0] - (model.vocab_padding if path[0] in ("embedding", "lm_head") else 0)
            spread = narrow if kind in _INTO_RESIDUAL else _SPREAD
            value = _drawn(jax.random.fold_in(key, zlib.crc32(repr(path).encode())), rows, want, spread, sharding)
        return variable.replace(value)

    return nnx.map_state(make, model.state)


def _drawn(key: jax.Array, rows: int, want: Any, spread: float, sharding: Any) -> jax.Array:
    def draw() -> jax.Array:
        value = spread * jax.random.normal(key, (rows, *want.shape[1:]), jnp.float32)
        return jnp.pad(value, [(0, want.shape[0] - rows)] + [(0, 0)] * (len(want.shape) - 1)).astype(want.dtype)

    return jax.jit(draw, out_shardings=sharding)()
