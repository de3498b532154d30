"""Reading a Hugging Face `config.json` so that nothing in it is overlooked.

`Fields` gives a family the values it computes with, and ends by looking at all the others (field_rules.py): what is
harmless passes, what would change the mathematics is refused by name, and what transformers does not know is named
in one log line. Plain Python.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxllm.checkpoints.quantized import METHODS
from jaxllm.config import LocalAttention, Scaling
from jaxllm.families.architecture_fields import RULES
from jaxllm.families.notices import say_once
from jaxllm.families.registry import architecture_of
from jaxllm.families.rope import rope_scaling

# transformers' names, several of them for one function.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
}
_HUGE = 1e30  # no number of a configuration comes near; infinite ones and NaN do not compare below it
_LARGEST = 2**31 - 1  # of any size: beyond it the file is damaged
_MOST = {"num_hidden_layers": 4096, "n_layer": 4096}  # each is walked in Python


class Fields:
    """The fields of one configuration and which of them were read.

    A missing key has the value that transformers takes for it (`FieldRules.defaults`), else the default given here;
    null has the latter, and is refused where transformers takes none.
    """

    def __init__(self, hf: Mapping[str, Any]):
        self.architecture = architecture_of(hf)
        self._rules = RULES[self.architecture]
        self._hf = dict(hf)
        for other, name in self._rules.spellings.items():
            if (value := self._hf.pop(other, None)) is not None:
                self._hf[name] = value
        self._read: set[str] = set()
        self._partial = 1.0
        quantization = self._hf.pop("quantization_config", None) or hf.get("quantization")  # the second is MLX's
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
        if quantization and (not isinstance(method, str) or method.lower() not in METHODS):
            raise ValueError(
                f"config.json has quantization_config {_short(method or quantization)}, which is not supported; use "
                f"unquantised weights or those of {', '.join(METHODS)}, or dequantise with transformers and save again"
            )

    def get(self, key: str, default: Any = None) -> Any:
        """The value, or the default where the key is missing or null."""
        self._read.add(key)
        if key not in self._hf:
            default = self._rules.defaults.get(key, default)
        value = self._hf.get(key)
        if value is None and key in self._hf and self._rules.refuses_null(key):
            raise ValueError(f"config.json has {key}=null; give it a value, or leave it out for transformers' default")
        return default if value is None else value

    def object(self, key: str) -> dict[str, Any]:
        """A copy of a JSON object; empty where the key is missing or null."""
        value = self.get(key, {})
        if not isinstance(value, Mapping):
            raise ValueError(f"config.json has {key}={_short(value)}; an object is required")
        return {name: item for name, item in value.items() if item is not None}

    def layers(self, key: str) -> tuple[int, ...]:
        """A list of layer numbers; empty where the key is missing or null."""
        value = self.get(key, [])
        if not isinstance(value, list) or not all(type(item) is int and item >= 0 for item in value):
            raise ValueError(f"config.json has {key}={_short(value)}; a list of layer numbers is required")
        return tuple(value)

    def skip(self, *keys: str) -> None:
        """Keys that change nothing in this family, or that the caller has dealt with."""
        self._read.update(keys)

    def number(self, key: str, default: float | None = None) -> Any:
        """A number; required unless there is a default."""
        return _number(key, self.get(key, default))

    def positive(self, key: str, default: float | None = None) -> float:
        """A number above 0; required unless there is a default."""
        return positive(key, self.get(key, default))

    def size(self, key: str, default: int | None = None) -> int:
        """A whole number of at least 1; required unless there is a default."""
        return self.count(key, default, least=1)

    def count(self, key: str, default: int | None = None, *, least: int = 0) -> int:
        """A whole number of at least `least`; required unless there is a default."""
        value, most = self.number(key, default), _MOST.get(key, _LARGEST)
        if value != int(value) or value < least:
            raise ValueError(f"config.json has {key}={value!r}; a whole number of at least {least} is required")
        if value > most:
            raise ValueError(f"config.json has {key}={value!r}; at most {most} is possible")
        return int(value)

    def flag(self, key: str, default: bool = False) -> bool:
        """A truth value."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise ValueError(f"config.json has {key}={_short(value)}; true or false is required")
        return value

    def only(self, key: str, *values: Any, default: Any = None) -> Any:
        """Refuse every value but these."""
        value = self.get(key, values[0] if default is None else default)
        if not _is_one_of(value, values):
            raise ValueError(f"config.json has {key}={_short(value)}; this family supports only {values[0]!r}")
        return value

    def activation(self, key: str = "hidden_act", default: str = "silu") -> str:
        """The activation's name here."""
        name = self.get(key, default)
        if not isinstance(name, str) or name not in ACTIVATIONS:
            raise ValueError(f"config.json has {key}={_short(name)}; supported are {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[name]

    def done(self) -> None:
        """Judge whatever was not read: pass, refuse, or name it in the log."""
        unknown = []
        for key, value in self._hf.items():
            if value is None or key in self._read or self._rules.passes(key) or self._has_no_window(key, value):
                continue
            values = self._rules.allowed(key)
            if values is None:
                unknown.append(key)
            elif not _is_one_of(value, values):
                raise ValueError(self._refusal(key, value, values))
        if unknown:
            say_once(
                f"config.json has fields that transformers' {self._rules.config_class} does not know; they are "
                f"ignored: {', '.join(sorted(map(str, unknown)))}"
            )

    def _has_no_window(self, key: str, value: Any) -> bool:
        """Whether a field about windows, in a model that has none, says that there is none."""
        if key == "layer_types":
            return isinstance(value, list) and all(kind == "full_attention" for kind in value)
        return key == "sliding_window" and self._hf.get("use_sliding_window") is False

    def _refusal(self, key: str, value: Any, values: tuple[Any, ...]) -> str:
        only = " or ".join(map(repr, values)) or "nothing or null"
        return (
            f"config.json has {key}={_short(value)}; {self.architecture} is computed here only with {only} "
            f"(set that if the weights do not need {key})"
        )

    # What several families share.

    def sizes(self, norm_eps: str = "rms_norm_eps") -> dict[str, Any]:
        """The sizes that every family but GPT-2 calls by the same names; `norm_eps` names the norms' epsilon."""
        hidden, heads = self.size("hidden_size"), self.size("num_attention_heads")
        return {
            "vocab_size": self.size("vocab_size"),
            "hidden_size": hidden,
            "intermediate_size": self.size("intermediate_size"),
            "num_layers": self.size("num_hidden_layers"),
            "num_heads": heads,
            "num_kv_heads": self.size("num_key_value_heads", heads),
            "head_dim": self.size("head_dim", max(1, hidden // heads)),
            "rms_norm_eps": self.positive(norm_eps),
            "max_position_embeddings": self.size("max_position_embeddings"),
            "tie_word_embeddings": self.flag("tie_word_embeddings"),
        }

    def rope(self, default_theta: float = 10000.0, default: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """`rope_theta` and `rope_scaling` of the decoder; `default` are the rope parameters of a file without any."""
        parameters = self.rope_parameters(default_theta, default or {})
        theta = positive("rope_theta", parameters.pop("rope_theta"))
        return {"rope_theta": theta, "rope_scaling": self.scaling(parameters)}

    def scaling(self, parameters: Mapping[str, Any]) -> Scaling | None:
        """The scaling of rope parameters without their theta; what they leave out stands beside them."""
        if parameters.get("partial_rotary_factor") == self._partial:
            parameters = {key: value for key, value in parameters.items() if key != "partial_rotary_factor"}
        beside = "original_max_position_embeddings"
        original = self.size(beside) if beside in self._rules.computed and self.get(beside) is not None else None
        return rope_scaling(parameters, self.size("max_position_embeddings"), original)

    def rotary_dim(self, head_dim: int, default: float = 1.0) -> int:
        """How many dims of a head turn: `partial_rotary_factor`, in the rope parameters or beside them."""
        nested = self.object("rope_scaling") or self.object("rope_parameters")
        factor = nested.get("partial_rotary_factor", self.get("partial_rotary_factor", default))
        if not 0 < positive("partial_rotary_factor", factor) <= 1:
            raise ValueError(f"config.json has partial_rotary_factor={factor!r}; a number up to 1 is required")
        self._partial = factor
        return int(head_dim * factor)

    def rope_parameters(self, default_theta: float, default: Mapping[str, Any]) -> dict[str, Any]:
        """One object out of the spellings, put together as transformers 5 does.

        `rope_scaling` (older, and what model cards say to add) replaces `rope_parameters` (newer) whole, its
        `rope_theta` included; then `rope_theta` beside them fills in, then the class's own.
        """
        newer, older = self.object("rope_parameters") or dict(default), self.object("rope_scaling")
        theta = self.number("rope_theta", default_theta)
        if older and (lost := newer.get("rope_theta")) and lost != older.get("rope_theta", theta):
            say_once(
                f"config.json has rope_scaling beside rope_parameters; as in transformers it replaces them whole, also "
                f"their rope_theta={lost}: the base is {older.get('rope_theta', theta)} now; write rope_theta={lost} "
                "into rope_scaling if that is not meant"
            )
        return {"rope_theta": theta, **(older or newer)}

    def local(self, num_layers: int, default: Sequence[int], theta: float | None = None) -> LocalAttention | None:
        """Which layers slide, from `layer_types` or else `default`, with `sliding_window`."""
        types = self.layer_types(num_layers)
        layers = tuple(default) if not types else tuple(i for i, t in enumerate(types) if t == "sliding_attention")
        if layers and self.get("sliding_window") is None and types:
            raise ValueError("config.json has sliding layers in layer_types but no sliding_window")
        if not layers or self.get("sliding_window") is None:
            return None
        return LocalAttention(window=self.size("sliding_window"), layers=layers, rope_theta=theta)

    def layer_types(self, num_layers: int) -> list[str]:
        """The kind of each layer's attention; empty where the file does not say."""
        types, known = self.get("layer_types"), ("sliding_attention", "full_attention")
        if types is None:
            return []
        if not isinstance(types, list) or len(types) != num_layers or any(t not in known for t in types):
            raise ValueError(
                f"config.json has layer_types={_short(types)}; expected {num_layers} of {' or '.join(known)}"
            )
        return types


def _short(value: Any) -> str:
    return repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."


def _is_one_of(value: Any, values: Sequence[Any]) -> bool:
    """`in`, without taking 1 for true or 0 for false."""
    return any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in values)


def _number(key: str, value: Any) -> Any:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not -_HUGE < value < _HUGE:
        raise ValueError(f"config.json has {key}={_short(value)}; a number is required")
    return value


def positive(key: str, value: Any) -> float:
    """The value of a field as a number above 0."""
    if _number(key, value) <= 0:
        raise ValueError(f"config.json has {key}={value!r}; a number above 0 is required")
    return float(value)
