"""PEFT's files of a LoRA adapter: a folder with `adapter_config.json` and `adapter_model.safetensors`, both ways.

Folder -> matrices of each module, under the names of the checkpoint's modules (`model.layers.0.self_attn.q_proj`);
whatever would change the numbers and is not computed here is refused by name. Knows nothing of decoders or devices.

Dimension letters: R rank, I inputs of a module, O outputs.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_WRAPPER = "base_model.model."
# Fields that say nothing about numbers, or whose say is read below. Any other is refused unless it asks for nothing.
_PLAIN = frozenset(
    "peft_type task_type auto_mapping peft_version base_model_name_or_path revision inference_mode r target_modules "
    "exclude_modules lora_alpha lora_dropout fan_in_fan_out bias use_rslora init_lora_weights layers_to_transform "
    "layers_pattern rank_pattern alpha_pattern megatron_core qalora_group_size runtime_config".split()
)
# Ways to draw the first matrices that change the base model as well: an adapter saved so needs that other base.
_OTHER_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True, slots=True)
class LoraMatrices:
    """What one module adds: `scale * x A^T B^T`; float arrays A `[R, I]` and B `[O, R]`."""

    a: np.ndarray
    b: np.ndarray
    scale: float


@dataclass(frozen=True, slots=True)
class PeftAdapter:
    """An adapter as its files say.

    Attributes:
        modules: by the names of the checkpoint's modules, without PEFT's wrapper.
        base_model: what it was trained on, as far as the file says.
        identity: changes with its numbers.
    """

    modules: Mapping[str, LoraMatrices]
    base_model: str | None = None
    identity: str = ""

    @property
    def rank(self) -> int:
        """The largest of its modules."""
        return max((m.a.shape[0] for m in self.modules.values()), default=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """What a new adapter is, as PEFT names it.

    Attributes:
        r: rank.
        lora_alpha: the update is scaled by `lora_alpha / r`.
        use_rslora: by `lora_alpha / sqrt(r)` instead.
        target_modules: last parts of the modules' names, such as `q_proj`.
        base_model_name_or_path: what it belongs to.
        task_type: `CAUSAL_LM`, say.
    """

    r: int = 16
    lora_alpha: float = 32.0
    use_rslora: bool = False
    target_modules: Sequence[str] = field(default_factory=tuple)
    base_model_name_or_path: str | None = None
    task_type: str = "CAUSAL_LM"

    @property
    def scale(self) -> float:
        """What the product of the matrices is multiplied by."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


def read_peft(folder: str | Path) -> PeftAdapter:
    """Read an adapter.

    Raises:
        ValueError: the folder, a field or a tensor that cannot be used, by name.
    """
    from jaxllm.checkpoints.safetensors_file import SafetensorsFile

    folder = Path(folder).expanduser()
    config, weights = _read_config(folder), folder / WEIGHTS_FILE
    if not weights.is_file():
        instead = "; convert adapter_model.bin with peft" if (folder / "adapter_model.bin").is_file() else ""
        raise ValueError(f"{folder}: no {WEIGHTS_FILE}{instead}")
    file = SafetensorsFile.open(weights)
    halves: dict[str, dict[str, np.ndarray]] = {}
    for name in file.tensors:
        match = _KEY.fullmatch(name)
        if match is None or len(file.tensors[name].shape) != 2:
            raise ValueError(f"{weights}: tensor {name} is not of a plain LoRA adapter; {_of_tensor(name)}")
        halves.setdefault(match["module"].removeprefix(_WRAPPER), {})[match["side"]] = file.read(name)
    modules = {name: _matrices(name, pair, config, weights) for name, pair in halves.items()}
    if not modules:
        raise ValueError(f"{weights}: no tensors")
    digest = hashlib.sha256((folder / CONFIG_FILE).read_bytes() + weights.read_bytes()).hexdigest()
    return PeftAdapter(modules, config.get("base_model_name_or_path"), digest)


def _of_tensor(name: str) -> str:
    if "lora_embedding" in name:
        return "adapters of embeddings are not supported"
    if "lora_magnitude" in name:
        return "DoRA is not supported"
    return "only attention and feed-forward matrices (lora_A.weight, lora_B.weight) are supported"


def _matrices(name: str, pair: Mapping[str, np.ndarray], config: Mapping[str, Any], file: Path) -> LoraMatrices:
    if set(pair) != {"A", "B"}:
        raise ValueError(f"{file}: {name} has only lora_{min(pair)}; an adapter has lora_A and lora_B")
    a, b = pair["A"], pair["B"]
    if a.shape[0] != b.shape[1] or not a.shape[0]:
        raise ValueError(f"{file}: {name} has lora_A of shape {a.shape} and lora_B of {b.shape}; their ranks differ")
    rank = _of_pattern(config["rank_pattern"], name, config["r"])
    if rank != a.shape[0]:
        raise ValueError(f"{file}: {name} has rank {a.shape[0]} but {CONFIG_FILE} says {rank}")
    alpha = _of_pattern(config["alpha_pattern"], name, config["lora_alpha"])
    return LoraMatrices(a, b, alpha / (math.sqrt(rank) if config["use_rslora"] else rank))


def _of_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value for a module, as PEFT finds it: the first pattern that its name, or the end of it, matches."""
    return next((v for key, v in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", module)), default)


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG_FILE
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        raise ValueError(f"{folder}: no {CONFIG_FILE}; give the folder that PEFT saved an adapter in") from None
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error})") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else config
        raise ValueError(f"{file}: peft_type={str(kind)[:60]!r}; only LORA adapters are supported")
    _check_config(file, config)
    defaults = {"r": 8, "lora_alpha": 8, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    config = defaults | {key: value for key, value in config.items() if value is not None}
    for name in ("r", "lora_alpha"):
        values = [config[name], *config["rank_pattern" if name == "r" else "alpha_pattern"].values()]
        if any(isinstance(v, bool) or not isinstance(v, int | float) or not 0 < v < 1e9 for v in values):
            raise ValueError(f"{file}: {name}={str(values)[:60]}; numbers above 0 are required")
    return config


def _check_config(file: Path, config: Mapping[str, Any]) -> None:
    """Refuse what changes the numbers in a way that is not computed here."""
    if config.get("bias", "none") != "none":
        raise ValueError(f"{file}: bias={config['bias']!r} trains biases as well, which is not supported")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_OTHER_BASE):
        raise ValueError(
            f"{file}: init_lora_weights={start!r} changes the base model too; save the adapter converted to plain LoRA "
            "(path_initial_model_for_weight_conversion of peft's save_pretrained)"
        )
    for name, value in config.items():
        if name not in _PLAIN and value:
            what = "DoRA" if name == "use_dora" else f"{name}={str(value)[:60]}"
            raise ValueError(f"{file}: {what} is not supported; only plain LoRA of attention and feed-forward matrices")
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(name) or {}, Mapping):
            raise ValueError(f"{file}: {name} is no object")


def write_peft(folder: str | Path, modules: Mapping[str, tuple[np.ndarray, np.ndarray]], config: LoraConfig) -> None:
    """Write an adapter that PEFT, vLLM and `read_peft` load.

    Args:
        folder: made when missing; an adapter that is there is replaced.
        modules: A `[R, I]` and B `[O, R]` of each module, by the names of the checkpoint's modules.
        config: its rank and scale; `target_modules` may be empty and is then taken from the names.
    """
    from safetensors.numpy import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, (a, b) in modules.items():
        if a.shape[0] != config.r or b.shape[1] != config.r:
            raise ValueError(f"{name} has matrices of shapes {a.shape} and {b.shape}; the rank is {config.r}")
        for side, matrix in (("A", a), ("B", b)):
            tensors[f"{_WRAPPER}{name}.lora_{side}.weight"] = np.ascontiguousarray(matrix)
    targets = list(config.target_modules) or _last_parts(modules)
    text = json.dumps(
        {
            "peft_type": "LORA",
            "task_type": config.task_type,
            "base_model_name_or_path": config.base_model_name_or_path,
            "r": config.r,
            "lora_alpha": config.lora_alpha,
            "use_rslora": config.use_rslora,
            "target_modules": targets,
            "bias": "none",
            "lora_dropout": 0.0,
            "fan_in_fan_out": any(name.endswith((".c_attn", ".c_proj", ".c_fc")) for name in modules),
            "inference_mode": True,
        },
        indent=2,
    )
    save_file(tensors, folder / f".{WEIGHTS_FILE}", metadata={"format": "pt"})
    (folder / f".{WEIGHTS_FILE}").replace(folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def _last_parts(modules: Iterable[str]) -> list[str]:
    """What PEFT finds the modules by; whole names beside experts, whose parts are called alike."""
    names = list(modules)
    if any(".shared_expert" in name for name in names):
        return sorted(names)
    return sorted({name.rpartition(".")[2] for name in names})
