"""`jaxllm merge`: an adapter's products added to the weights they stand beside.

Dimension letters: P modules of a parameter, R rank, I inputs, S indices of the dim that modules lie along.
"""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxllm.adapters.peft import read_peft
from jaxllm.adapters.targets import Target, place, targets_of
from jaxllm.config import EngineConfig
from jaxllm.families import family_of, read_config
from jaxllm.sharding.mesh import Placement, make_mesh
from jaxllm.sharding.rules import load_rules
from jaxllm.tokenizer import load_tokenizer
from jaxllm.training.loss import name_of
from jaxllm.training.origin import Origin
from jaxllm.training.output import write_model
from jaxllm.weights.abstract import abstract_model
from jaxllm.weights.source import open_source


def merge(adapter: str, model: str | None, output: Path, dtype: str = "bfloat16") -> str:
    """Write `model` with `adapter` (a PEFT folder) in its weights to the new folder `output`.

    Args:
        model: anything `--model` names; None: what the adapter says it was trained on.

    Returns:
        The model's name.

    Raises:
        ValueError: the adapter does not fit the model, or the folder is not new.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and is not empty; name a new folder")
    read = read_peft(adapter)
    name = model or read.base_model
    if name is None:
        raise ValueError(f"{adapter}: does not say which model it was trained on; say --model NAME")
    source = open_source(EngineConfig(model=name))
    assert source.path is not None
    cfg = read_config(source.hf_config)
    abstract = abstract_model(cfg, Placement(make_mesh("tp=1"), load_rules("replicated")), jnp.dtype(jnp.float32))
    variables = dict(nnx.to_flat_state(abstract.state))
    targets = targets_of(family_of(source.hf_config).weight_map(cfg, 1), variables)
    sizes = {key: (m.a.shape[0], m.a.shape[1], m.b.shape[0]) for key, m in read.modules.items()}
    modules = {
        ours: (m.a.astype(np.float32), m.b.astype(np.float32) * np.float32(m.scale))
        for theirs, ours in place(targets, sizes).items()
        if (m := read.modules[theirs])
    }
    parameters = {
        name_of(path): np.asarray(leaf.get_value()) for path, leaf in nnx.to_flat_state(source.parameters(abstract))
    }
    for key, target in targets.items():
        parameters[key] = parameters[key] + product_of(target, *target.from_modules(modules, read.rank, np.float32))
    write_model(output, Origin(dict(source.hf_config), load_tokenizer(source.path), source), parameters, dtype, None)
    return name


def product_of(target: Target, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """What a target's matrices `a [P, R, ...]` and `b [R, ...]` add to its parameter, in that one's shape."""
    num_inputs = len(target.contracted)
    assert target.contracted == tuple(range(num_inputs)), target.contracted
    a_PRI = a.reshape(*a.shape[:2], -1)
    if target.stacked is None:
        return np.tensordot(a_PRI[0], b, ((0,), (0,))).reshape(target.shape)
    b_SR = np.moveaxis(b, 1 + target.stacked, 0)
    a_SRI = a_PRI[np.array(target.module_of)]
    change = np.stack([np.tensordot(left, right, ((0,), (0,))) for left, right in zip(a_SRI, b_SR, strict=True)])
    return np.moveaxis(change, 0, 1 + target.stacked).reshape(target.shape)
