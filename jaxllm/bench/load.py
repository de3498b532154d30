"""How fast and in how much memory a checkpoint is loaded: a folder of dummy weights, `cat`, and the loader.

A size -> seconds, bytes per second against `cat FILES > /dev/null` on the same warm files, and the peak resident
memory of a fresh process that does nothing but load.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

_LAYER = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 4}
_VOCAB = 32000
_BASE = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": _VOCAB,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    **_LAYER,
}
_LOAD = """
import json, sys, time
from pathlib import Path
from jaxllm.config import EngineConfig
from jaxllm.families import read_config
from jaxllm.checkpoints import open_checkpoint
from jaxllm.weights.abstract import make_model
from jaxllm.weights.loader import load_parameters
from jaxllm.sharding.mesh import Placement, make_mesh
from jaxllm.sharding.rules import load_rules
import jax
path, mesh = Path(sys.argv[1]), sys.argv[2]
# Not getrusage: its maximum is inherited from the process that started this one.
peak = lambda: 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
checkpoint = open_checkpoint(path)
placement = Placement(make_mesh(mesh), load_rules("megatron"))
model = make_model(EngineConfig(), read_config(checkpoint.config), placement)
jax.block_until_ready(jax.device_put(0.0))
before = peak()
started = time.perf_counter()
params = jax.block_until_ready(load_parameters(model, checkpoint))
print(json.dumps({"seconds": time.perf_counter() - started, "before": before, "peak": peak(),
                  "parameters": sum(a.nbytes for a in jax.tree.leaves(params))}))
"""


def measure_load(*, num_bytes: int, num_files: int = 4, mesh: str = "tp=1", num_iters: int = 3) -> dict[str, Any]:
    """Make a folder of about `num_bytes`, load it `num_iters` times and report the fastest; every file is warm."""
    with tempfile.TemporaryDirectory(prefix="jaxllm-bench-load-") as folder:
        files = _make_folder(Path(folder), num_bytes, num_files)
        size = sum(file.stat().st_size for file in files)
        reads = [_read(files) for _ in range(num_iters)]
        cats = [_cat(files) for _ in range(num_iters + 1)][1:]
        loads = [_load(folder, mesh) for _ in range(num_iters)]
    best, cat = min(loads, key=lambda load: load["seconds"]), min(cats)
    return {
        "checkpoint_bytes": size,
        "num_files": num_files,
        "mesh": mesh,
        "load_s": best["seconds"],
        "load_bytes_per_s": size / best["seconds"],
        "cat_s": cat,
        "cat_bytes_per_s": size / cat,
        "read_bytes_per_s": size / min(reads),
        "relative_to_cat": cat / best["seconds"],
        "relative_to_read": min(reads) / best["seconds"],
        "peak_memory_bytes": max(load["peak"] for load in loads),
        "memory_before_load_bytes": max(load["before"] for load in loads),
        "peak_over_checkpoint": max(load["peak"] for load in loads) / size,
        "growth_over_checkpoint": max(load["peak"] - load["before"] for load in loads) / size,
    }


def format_report(report: dict[str, Any]) -> str:
    """A table for a person."""
    return "\n".join(
        [
            f"checkpoint       {report['checkpoint_bytes'] / 1e9:8.2f} GB in {report['num_files']} files",
            f"load             {report['load_s']:8.2f} s   {report['load_bytes_per_s'] / 1e9:6.2f} GB/s",
            f"cat              {report['cat_s']:8.2f} s   {report['cat_bytes_per_s'] / 1e9:6.2f} GB/s",
            f"read into memory {'':10}   {report['read_bytes_per_s'] / 1e9:6.2f} GB/s",
            f"load / cat       {report['relative_to_cat']:8.1%}",
            f"load / read      {report['relative_to_read']:8.1%}",
            f"peak memory      {report['peak_memory_bytes'] / 1e9:8.2f} GB  {report['peak_over_checkpoint']:6.1%} "
            f"of the checkpoint ({report['memory_before_load_bytes'] / 1e9:.2f} GB before loading)",
        ]
    )


def _make_folder(folder: Path, num_bytes: int, num_files: int) -> list[Path]:
    import ml_dtypes
    import numpy as np
    from safetensors.numpy import save_file

    from jaxllm.families import read_config
    from jaxllm.families.llama import weight_map

    def tensors(layers: int) -> dict[str, tuple[int, ...]]:
        cfg = read_config(_BASE | {"num_hidden_layers": layers})
        return {part.name: part.shape for source in weight_map(cfg).values() for part in source.parts}

    def total(layers: int) -> int:
        return 2 * sum(int(np.prod(shape)) for shape in tensors(layers).values())

    per_layer = total(2) - total(1)
    layers = max(1, round((num_bytes - total(1)) / per_layer) + 1)
    (folder / "config.json").write_text(json.dumps(_BASE | {"num_hidden_layers": layers}))
    names = list(tensors(layers).items())
    rng, weight_map_json, files = np.random.default_rng(0), {}, []
    for i in range(num_files):
        part = names[i * len(names) // num_files : (i + 1) * len(names) // num_files]
        file = folder / f"model-{i + 1:05}-of-{num_files:05}.safetensors"
        save_file({n: rng.standard_normal(s, np.float32).astype(ml_dtypes.bfloat16) for n, s in part}, file)
        weight_map_json |= {name: file.name for name, _ in part}
        files.append(file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map_json}))
    return files


def _cat(files: list[Path]) -> float:
    started = time.perf_counter()
    with open("/dev/null", "wb") as sink:
        subprocess.run(["cat", *map(str, files)], stdout=sink, check=True)
    return time.perf_counter() - started


def _read(files: list[Path]) -> float:
    """Read every file into memory that is new to the process: the least that a loader has to do.

    `cat FILE > /dev/null` does less than that: the kernel splices pages and copies nothing.
    """
    started = time.perf_counter()
    for file in files:
        file.read_bytes()
    return time.perf_counter() - started


def _load(folder: str, mesh: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, "-c", _LOAD, folder, mesh], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)
