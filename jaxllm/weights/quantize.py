"""A checkpoint's linears rounded to nearest, as compressed-tensors files have them.

Tensors in, tensors out, one at a time, and the `quantization_config` that says what was done: vLLM, transformers and
this package load the result. Tables, the head, routers and norms stay as they are.

Dimension letters: N outputs, K inputs, J groups of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from flax import nnx

from jaxllm.checkpoints import Checkpoint
from jaxllm.config.quantization import Scheme
from jaxllm.families import family_of, read_config
from jaxllm.weights.pieces import merged_part
from jaxllm.weights.rounding import Pieces, round_to_nearest
from jaxllm.weights.schemes import FP8, INT4_GROUPS, INT8, int4

_KIND = re.compile(r"(int8|fp8|int4)(?::([1-9][0-9]{0,5}))?")
_FORMATS = {"uint4": "pack-quantized", "int8": "pack-quantized", "float8_e4m3fn": "float-quantized"}


@dataclass(frozen=True, slots=True)
class Plan:
    """What is rounded, and how.

    Attributes:
        scheme: of all linears.
        linears: names of their tensors, `[N, K]`.
        ignored: modules with a matrix that is not rounded.
    """

    scheme: Scheme
    linears: frozenset[str]
    ignored: tuple[str, ...]

    def config(self) -> dict[str, Any]:
        """The `quantization_config` of the result."""
        s = self.scheme
        weights = {
            "num_bits": s.bits,
            "type": "float" if s.codes == "float8_e4m3fn" else "int",
            "symmetric": True,
            "strategy": "group" if s.group else "channel",
            "group_size": s.group or None,
            "dynamic": False,
        }
        group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
        return {
            "quant_method": "compressed-tensors",
            "format": _FORMATS[s.codes],
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": list(self.ignored),
            "kv_cache_scheme": None,
        }


def plan_rounding(kind: str, checkpoint: Checkpoint) -> Plan:
    """Read `int8`, `int4[:GROUP]` or `fp8`. Raises ValueError where it is none, or a layer's inputs do not divide."""
    if (match := _KIND.fullmatch(kind)) is None or (match[2] and match[1] != "int4"):
        raise ValueError(
            f"cannot quantize to {kind!r}; use int8, int4, int4:GROUP (of inputs that share a scale) or fp8"
        )
    linears = _linears(checkpoint)
    if not linears:
        raise ValueError(
            "this model's blocks have no linears [outputs, inputs] in tensors of their own: none is quantised"
        )
    scheme = {"int8": INT8, "fp8": FP8}.get(match[1]) or int4(_group(match[2], linears))
    matrices = {name for name, info in checkpoint.tensors.items() if name.endswith(".weight") and len(info.shape) == 2}
    ignored = sorted(name.removesuffix(".weight") for name in {*matrices, "lm_head.weight"} - linears.keys())
    return Plan(scheme, frozenset(linears), tuple(ignored))


def _linears(checkpoint: Checkpoint) -> dict[str, int]:
    """Tensors `[N, K]` of the blocks whose inputs come last: name -> K."""
    from jaxllm.models.decoder import Decoder

    cfg = read_config(checkpoint.config)
    model = nnx.eval_shape(lambda: Decoder(cfg, dtype=np.dtype(np.float32)))
    sources: Mapping[Any, Any] = family_of(checkpoint.config).weight_map(cfg, 1)
    found = {}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        inputs = variable.get_metadata("inputs")
        source = sources[path]  # type: ignore[index]  (keys of the state are names and numbers)
        for part in source.parts if path[0] == "layers" and inputs else ():
            if len(part.shape) == 2 and part.name.endswith(".weight") and merged_part(part, inputs)[1] == 1:
                found[part.name] = part.shape[1]
    return found


def _group(asked: str | None, linears: Mapping[str, int]) -> int:
    odd = None
    for group in (int(asked),) if asked else INT4_GROUPS:
        odd = next((name for name, inputs in linears.items() if inputs % group or group % 2), None)
        if odd is None:
            return group
    groups = asked or " or ".join(map(str, INT4_GROUPS))
    inputs = linears[odd] if odd else 0
    raise ValueError(f"layer {odd}: its {inputs} inputs do not divide into groups of {groups}; use int4:GROUP")


def rounded(tensors: Iterable[tuple[str, np.ndarray]], plan: Plan) -> Iterator[tuple[str, np.ndarray]]:
    """The same tensors, linears as codes and scales."""
    for name, tensor in tensors:
        if name not in plan.linears:
            yield name, tensor
            continue
        pieces = round_to_nearest(np.asarray(tensor, np.float32), plan.scheme, 1)
        yield from stored_linear(name, pieces, plan.scheme)


def stored_linear(name: str, pieces: Pieces, scheme: Scheme) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors that compressed-tensors keeps a linear in; `name` is that of its weights."""
    layer = name.removesuffix(".weight")
    scale = np.float32 if scheme.scale_dtype == "float32" else ml_dtypes.bfloat16
    yield f"{layer}.weight_scale", np.asarray(pieces.scales, scale)
    if scheme.codes == "float8_e4m3fn":
        yield f"{layer}.weight", pieces.codes
        return
    unsigned = pieces.codes if scheme.bits == 4 else pieces.codes.view(np.uint8) ^ 128
    yield f"{layer}.weight_packed", _words(unsigned, scheme.bits)
    yield f"{layer}.weight_shape", np.array(pieces.codes.shape, np.int64)


def _words(codes_NK: np.ndarray, bits: int) -> np.ndarray:
    """int32 `[N, K * bits / 32]`, the lowest bits first; missing codes of the last word are zeros."""
    count = 32 // bits
    padded = np.pad(codes_NK, ((0, 0), (0, -codes_NK.shape[1] % count))).reshape(len(codes_NK), -1, count)
    words = np.zeros(padded.shape[:2], np.uint32)
    for nth in range(count):
        words |= padded[..., nth].astype(np.uint32) << np.uint32(bits * nth)
    return words.view(np.int32)


def write_config(plan: Plan, folder: Path) -> None:
    """Put the `quantization_config` into the folder's configuration."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) | {"quantization_config": plan.config()}
    file.write_text(json.dumps(config, indent=1, ensure_ascii=False), encoding="utf-8")
