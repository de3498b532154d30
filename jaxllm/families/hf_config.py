"""Reading a Hugging Face `config.json` so that nothing in it is overlooked.

`Fields` remembers what a family has read; a key that nobody read and that is not known to change nothing is
refused by name. Plain Python.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxllm.config import LocalAttention, Scaling
from jaxllm.families.rope import rope_scaling

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
        self._partial = 1.0
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
        return {"rope_theta": float(theta), "rope_scaling": self.scaling(parameters)}

    def scaling(self, parameters: Mapping[str, Any]) -> Scaling | None:
        """The scaling of rope parameters without their theta; what they leave out stands beside them."""
        if parameters.get("partial_rotary_factor") == self._partial:
            parameters = {key: value for key, value in parameters.items() if key != "partial_rotary_factor"}
        original = self.get("original_max_position_embeddings")
        return rope_scaling(parameters, self.get("max_position_embeddings"), original)

    def rotary_dim(self, head_dim: int, default: float = 1.0) -> int:
        """How many dims of a head turn: `partial_rotary_factor`, in the rope parameters or beside them."""
        nested = self.get("rope_parameters") or self.get("rope_scaling") or {}
        self._partial = nested.get("partial_rotary_factor") or self.number("partial_rotary_factor", default)
        self.skip("partial_rotary_factor")
        return int(head_dim * self._partial)

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
