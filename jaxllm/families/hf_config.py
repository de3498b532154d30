"""Reading a Hugging Face `config.json` so that nothing in it is overlooked.

`Fields` remembers what a family has read; a key that nobody read and that is not known to change nothing is
refused by name. Plain Python.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxllm.config import LinearScaling, LocalAttention, RopeScaling, YarnScaling

# Keys that do not change what one forward pass of the decoder computes.
_IGNORED = frozenset(
    "architectures model_type torch_dtype dtype transformers_version use_cache initializer_range bos_token_id "
    "eos_token_id pad_token_id unk_token_id attention_dropout hidden_dropout _name_or_path is_llama_config "
    "transformers.js_config task_specific_params id2label label2id problem_type return_dict output_attentions "
    "output_hidden_states chunk_size_feed_forward _attn_implementation _attn_implementation_autoset "
    "is_encoder_decoder cache_implementation keys_to_ignore_at_inference embd_pdrop resid_pdrop attn_pdrop "
    "summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout n_ctx "
    "router_aux_loss_coef output_router_logits router_jitter_noise aux_loss_alpha seq_aux ep_size auto_map "
    "num_nextn_predict_layers num_mtp_layers initial_context_length experts_per_token "
    "_sliding_window_pattern is_decoder".split()
)
# Keys that would change the mathematics, with the only value any family here computes.
_FIXED: dict[str, Any] = {
    "attention_bias": False,
    "mlp_bias": False,
    "rope_interleaved": False,
    "pretraining_tp": 1,
    "use_sliding_window": False,
    "sliding_window": None,
    "partial_rotary_factor": 1.0,
    "add_cross_attention": False,
    "use_bidirectional_attention": False,
}
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}


class Fields:
    """The keys of one configuration and which of them were read."""

    def __init__(self, hf: Mapping[str, Any]):
        self._hf = hf
        self._read: set[str] = set()
        if quantization := hf.get("quantization_config"):
            method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
            raise ValueError(
                f"config.json has quantization_config {method!r}, which is not supported; use the unquantised weights, "
                "or dequantise with transformers and save again"
            )

    def get(self, key: str, default: Any = None) -> Any:
        """The value, or the default where the key is missing or null."""
        self._read.add(key)
        value = self._hf.get(key)
        return default if value is None else value

    def skip(self, *keys: str) -> None:
        """Keys that change nothing in this family, or that the caller has dealt with."""
        self._read.update(keys)

    def number(self, key: str, default: float | None = None) -> Any:
        """A number; required unless there is a default."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"config.json has {key}={value!r}; a number is required")
        return value

    def size(self, key: str, default: int | None = None) -> int:
        """A whole number of at least 1."""
        value = self.number(key, default)
        if value != int(value) or value < 1:
            raise ValueError(f"config.json has {key}={value!r}; a whole number of at least 1 is required")
        return int(value)

    def flag(self, key: str, default: bool = False) -> bool:
        """A truth value."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise ValueError(f"config.json has {key}={value!r}; true or false is required")
        return value

    def only(self, key: str, *values: Any, default: Any = None) -> Any:
        """Refuse every value but these."""
        value = self.get(key, values[0] if default is None else default)
        if value not in values:
            raise ValueError(f"config.json has {key}={value!r}; this family supports only {values[0]!r}")
        return value

    def activation(self, key: str = "hidden_act", default: str = "silu") -> str:
        """The activation's name here."""
        name = self.get(key, default)
        if name not in _ACTIVATIONS:
            raise ValueError(f"config.json has {key}={name!r}; supported are {', '.join(_ACTIVATIONS)}")
        return _ACTIVATIONS[name]

    def done(self) -> None:
        """Refuse whatever was not read."""
        for key, value in self._hf.items():
            if key in self._read or key in _IGNORED or value is None:
                continue
            if key in _FIXED:
                self.only(key, _FIXED[key])
            elif key != "quantization_config":
                raise ValueError(
                    f"config.json has an unknown field {key}={str(value)[:60]} that may change the mathematics; refused"
                )

    # What several families share.

    def sizes(self) -> dict[str, Any]:
        """The sizes that every family but GPT-2 calls by the same names."""
        hidden, heads = self.size("hidden_size"), self.size("num_attention_heads")
        return {
            "vocab_size": self.size("vocab_size"),
            "hidden_size": hidden,
            "intermediate_size": self.size("intermediate_size"),
            "num_layers": self.size("num_hidden_layers"),
            "num_heads": heads,
            "num_kv_heads": self.size("num_key_value_heads", heads),
            "head_dim": self.size("head_dim", max(1, hidden // heads)),
            "rms_norm_eps": float(self.number("rms_norm_eps")),
            "max_position_embeddings": self.size("max_position_embeddings"),
            "tie_word_embeddings": self.flag("tie_word_embeddings"),
        }

    def rope(self, default_theta: float = 10000.0) -> dict[str, Any]:
        """`rope_theta` and `rope_scaling`; transformers 5 writes both as `rope_parameters`."""
        theta = self.number("rope_theta", default_theta)
        parameters = dict(self.get("rope_parameters") or self.get("rope_scaling") or {})
        self.skip("rope_parameters", "rope_scaling")
        theta = parameters.pop("rope_theta", theta)
        scaling = rope_scaling(parameters, self.get("max_position_embeddings"))
        return {"rope_theta": float(theta), "rope_scaling": scaling}

    def local(self, num_layers: int, default: Sequence[int], theta: float | None = None) -> LocalAttention | None:
        """Which layers slide, from `layer_types` or else `default`, with `sliding_window`."""
        types = self.get("layer_types")
        window = self.get("sliding_window")
        layers = tuple(default)
        if types is not None:
            if len(types) != num_layers or not set(types) <= {"sliding_attention", "full_attention"}:
                raise ValueError(
                    f"config.json has layer_types={str(types)[:60]}; expected {num_layers} of sliding_attention or "
                    "full_attention"
                )
            layers = tuple(i for i, kind in enumerate(types) if kind == "sliding_attention")
        if not layers or window is None:
            if types is not None and layers:
                raise ValueError("config.json has sliding layers in layer_types but no sliding_window")
            return None
        return LocalAttention(window=self.size("sliding_window"), layers=layers, rope_theta=theta)


def rope_scaling(
    parameters: Mapping[str, Any], max_positions: int | None = None
) -> RopeScaling | LinearScaling | YarnScaling | None:
    """The scaling that `rope_scaling` or `rope_parameters` (without its theta) describes; refused if unknown."""
    left = {key: value for key, value in parameters.items() if value is not None}
    kind = left.pop("rope_type", None) or left.pop("type", None) or "default"
    left.pop("type", None)
    if left.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("partial_rotary_factor in the rope parameters is not supported by this family")
    if kind == "default":
        scaling = None
    elif kind == "linear":
        scaling = LinearScaling(factor=float(_take(left, kind, "factor")))
        left.pop("original_max_position_embeddings", None)
    elif kind == "llama3":
        scaling = RopeScaling(
            factor=float(_take(left, kind, "factor")),
            low_freq_factor=float(_take(left, kind, "low_freq_factor")),
            high_freq_factor=float(_take(left, kind, "high_freq_factor")),
            original_max_position=int(_take(left, kind, "original_max_position_embeddings")),
        )
    elif kind == "yarn":
        scaling = _yarn(left, max_positions)
    else:
        raise ValueError(f"rope_type={kind!r} is not supported; supported are default, linear, llama3 and yarn")
    if left:
        raise ValueError(f"the rope parameters have an unknown field {min(left)!r} for rope_type={kind!r}; refused")
    return scaling


def _yarn(left: dict[str, Any], max_positions: int | None) -> YarnScaling:
    original = int(left.pop("original_max_position_embeddings", None) or max_positions or 0)
    factor = float(_take(left, "yarn", "factor"))
    own, mscale, all_dim = (left.pop(key, None) for key in ("attention_factor", "mscale", "mscale_all_dim"))
    attention = own
    if own is None:
        attention = yarn_magnitude(factor)
        if mscale and all_dim:
            attention = yarn_magnitude(factor, mscale) / yarn_magnitude(factor, all_dim)
    return YarnScaling(
        factor=factor,
        beta_fast=float(left.pop("beta_fast", 32.0)),
        beta_slow=float(left.pop("beta_slow", 1.0)),
        original_max_position=original,
        attention_factor=float(attention),
        truncate=bool(left.pop("truncate", True)),
    )


def yarn_magnitude(factor: float, weight: float = 1.0) -> float:
    """YaRN's growth of the scores with the stretch: `0.1 w ln(factor) + 1`."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _take(left: dict[str, Any], kind: str, key: str) -> Any:
    if key not in left:
        raise ValueError(f"the rope parameters of rope_type={kind!r} lack {key!r}")
    return left.pop(key)
