"""Damaged quantised checkpoints: refused in one line that names the layer, or the same weights; never others."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxllm.checkpoints.safetensors_file import SafetensorsFile
from tests.helpers import quantized_models as made
from tests.weights.test_compressed_tensors import layout
from tests.weights.test_quantized_formats import AWQ, FP8, GPTQ, parameters

NONSENSE: list[Any] = [
    0,
    1,
    -1,
    3,
    16,
    64,
    128,
    "x",
    "",
    None,
    [],
    {},
    True,
    2.5,
    [128, 128],
    [16, 16],
    "gptq",
    "awq",
    "gptq_v2",
    "static",
    "e5m2",
    "tensor",
    "channel",
    "block",
    "float",
    "marlin",
]
QUIET = {"quantization_status", "kv_cache_scheme", "ignore", "dynamic", "version"}  # say nothing of the numbers


def damaged(rng: random.Random, config: dict[str, Any], tensors: made.Tensors) -> str:
    """Change one thing; what it was."""
    quantization = config["quantization_config"]
    kind = rng.choice(["field", "drop", "dtype", "shape", "truncate", "nan"])
    if kind == "field":
        where = rng.choice(
            [quantization, *(quantization.get("config_groups", {}).get("group_0", {}).get("weights", {}),)]
        )
        key = rng.choice(list(where or quantization))
        (where or quantization)[key] = rng.choice(NONSENSE)
        return f"field {key}={(where or quantization)[key]!r}"
    own = [name for name in tensors if name.rpartition(".")[2] not in ("weight",) or "_proj" in name]
    name = rng.choice([n for n in own if "_proj." in n])
    tensor = tensors[name]
    if kind == "drop" or tensor.size < 2:
        del tensors[name]
    elif kind == "dtype":
        other = np.float32 if tensor.dtype != np.float32 else np.int32
        tensors[name] = np.asarray(tensor, np.float32).astype(other)
    elif kind == "shape":
        tensors[name] = tensor.T.copy() if tensor.ndim == 2 and tensor.shape[0] != tensor.shape[1] else tensor[None]
    elif kind == "truncate":
        tensors[name] = tensor[: max(1, len(tensor) // 2)].copy()
    else:
        scales = [n for n in own if n.endswith(("scales", "weight_scale", "weight_scale_inv"))]
        name = rng.choice(scales)
        tensors[name] = tensors[name].copy()
        tensors[name].reshape(-1)[rng.randrange(tensors[name].size)] = np.nan
    return f"{kind} {name}"


def tensors_of(path: Path) -> made.Tensors:
    """Copies of all tensors of a file."""
    file = SafetensorsFile.open(path)
    return {name: file.read(name).copy() for name in file.tensors}


@pytest.mark.parametrize(
    ("name", "make", "config"),
    [
        ("awq", made.awq, AWQ),
        ("gptq", made.gptq, GPTQ),
        ("fp8", made.fp8_blocks, FP8),
        ("w4a16", *layout("w4a16")),
    ],
)
def test_no_damage_loads_as_other_weights(name: str, make: made.Layout, config: dict[str, Any], tmp_path: Path) -> None:
    made.quantize("dense", make, config, tmp_path)
    want = parameters(tmp_path, "tp=1")
    original, whole = json.loads((tmp_path / "config.json").read_text()), tensors_of(tmp_path / "model.safetensors")
    rng, refused = random.Random(name), 0
    for _ in range(80):
        changed, tensors = copy.deepcopy(original), dict(whole)
        what = damaged(rng, changed, tensors)
        (tmp_path / "config.json").write_text(json.dumps(changed))
        save_file({n: np.ascontiguousarray(t) for n, t in tensors.items()}, tmp_path / "model.safetensors")
        try:
            got = parameters(tmp_path, "tp=1")
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 1000, what
            if not what.startswith("field"):
                layer = what.split()[1].rpartition(".")[0]
                assert layer in str(error), (what, error)
            continue
        except AssertionError:  # nothing is quantised any more, and everything fits: never
            raise AssertionError(what) from None
        for path, value in got.items():
            np.testing.assert_allclose(value, want[path], rtol=1e-5, atol=1e-6, err_msg=f"{what} {path}")
    assert refused > 40
