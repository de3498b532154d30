"""Which numbers a run changes: all weights, the last block and the head, a new head alone, or a low-rank adapter.

A model's parameters by name -> those that are trained (float32), those that are not (in the dtype they are used in),
and the products that go with them.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from jaxllm.adapters.peft import LoraConfig, write_peft
from jaxllm.adapters.product import LowRank, adapted_product
from jaxllm.adapters.targets import Target, targets_of
from jaxllm.families.registry import family_of
from jaxllm.models.primitives import Product, plain_product
from jaxllm.training.config import TrainConfig
from jaxllm.training.loss import Parameters, name_of
from jaxllm.training.merge import product_of
from jaxllm.weights.abstract import AbstractModel

HEAD = "score"


@dataclass(frozen=True, slots=True)
class Trained:
    """What is trained and what is not.

    Attributes:
        parameters: float32, by name. frozen: the others. shardings: of the trained ones.
        matrices: names of those that weight decay pulls towards zero.
        product: see `LossModel`.
    """

    parameters: dict[str, jax.Array]
    frozen: dict[str, jax.Array]
    shardings: dict[str, NamedSharding]
    matrices: frozenset[str]
    product: Callable[[Parameters], Product] = lambda parameters: plain_product


def choose_trained(
    config: TrainConfig,
    model: AbstractModel,
    parameters: dict[str, jax.Array],
    adapter: Adapter | None,
    num_labels: int,
) -> Trained:
    """Split a model's parameters.

    Args:
        model: the decoder with its matrices in the dtype of products.
        parameters: all of them, float32.
        adapter: where one is trained.
        num_labels: of a classifier, whose head is new and always trained; else 0.
    """
    whole = model.placement.replicated
    variables = {name_of(path): variable for path, variable in nnx.to_flat_state(model.state)}
    shardings = {name_of(path): leaf.get_value() for path, leaf in nnx.to_flat_state(model.shardings())}
    matrices = {name for name, v in variables.items() if v.get_value().dtype != jnp.float32 or _is_matrix(name, v)}
    if num_labels and "lm_head" in parameters:
        parameters["lm_head"] = jnp.zeros_like(parameters["lm_head"])  # nothing reads it
    chosen = {} if adapter else {name: value for name, value in parameters.items() if _is_chosen(name, config, model)}
    frozen = {
        name: value.astype(variables[name].get_value().dtype)
        for name, value in parameters.items()
        if name not in chosen
    }
    chosen_shardings = {name: shardings[name] for name in chosen}
    if num_labels:
        key = jax.random.fold_in(jax.random.key(config.seed), zlib.crc32(HEAD.encode()))
        head = 0.02 * jax.random.normal(key, (num_labels, model.cfg.hidden_size), jnp.float32)
        chosen[HEAD], chosen_shardings[HEAD] = jax.device_put(head, whole), whole
        matrices.add(HEAD)
    if adapter:
        fresh = adapter.initial(config.seed)
        chosen |= {name: jax.device_put(value, whole) for name, value in fresh.items()}
        chosen_shardings |= dict.fromkeys(fresh, whole)
        matrices |= fresh.keys()
    return Trained(
        chosen,
        frozen,
        chosen_shardings,
        frozenset(matrices & chosen.keys()),
        adapter.product if adapter else lambda parameters: plain_product,
    )


def _is_matrix(name: str, variable: nnx.Variable) -> bool:
    """By name where everything is float32: norms, biases and the like are vectors, however they are shaped."""
    kind = name.rpartition(".")[2]
    return len(variable.get_value().shape) > 1 and not kind.endswith(("bias", "norm", "sinks"))


def _is_chosen(name: str, config: TrainConfig, model: AbstractModel) -> bool:
    if config.trainable == "all":
        return not (config.task == "classify" and name == "lm_head")
    head = name in ("lm_head",) and config.task != "classify"
    if config.trainable == "head":
        return head
    return head or name.startswith((f"layers.{model.cfg.num_layers - 1}.", "final_norm."))


@dataclass(frozen=True)
class Adapter:
    """A low-rank adapter that is being trained: A by name `lora.a.NAME` `[P, R, ...]`, B `lora.b.NAME` `[R, ...]`.

    Attributes:
        targets: parameters that take it. chosen: for each, which of its modules do.
        config: rank, alpha and modules, as PEFT names them.
        dtype: of its products.
    """

    targets: Mapping[str, Target]
    chosen: Mapping[str, tuple[bool, ...]]
    config: LoraConfig
    dtype: jnp.dtype

    @classmethod
    def of(cls, config: TrainConfig, model: AbstractModel, hf: Mapping[str, Any]) -> Adapter:
        """For a model. Raises ValueError naming a module that it has not."""
        sources = family_of(hf).weight_map(model.cfg, model.kv_copies)
        targets = targets_of(sources, {tuple(path): v for path, v in nnx.to_flat_state(model.state)})
        kinds = sorted({module.rpartition(".")[2] for target in targets.values() for module in target.modules})
        wanted = [name.strip() for name in config.lora_targets.split(",")] if config.lora_targets else kinds
        if unknown := [name for name in wanted if name not in kinds]:
            raise ValueError(f"lora_targets names {unknown[0]!r}; this model has {', '.join(kinds)}")
        chosen = {
            name: tuple(module.rpartition(".")[2] in wanted for module in target.modules)
            for name, target in targets.items()
        }
        lora = LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.alpha,
            use_rslora=config.use_rslora,
            target_modules=wanted,
            base_model_name_or_path=config.model,
            task_type="SEQ_CLS" if config.task == "classify" else "CAUSAL_LM",
        )
        dtype = dict(nnx.to_flat_state(model.state))["embedding",].get_value().dtype
        return cls({name: targets[name] for name in targets if any(chosen[name])}, chosen, lora, dtype)

    def initial(self, seed: int) -> dict[str, np.ndarray]:
        """As PEFT draws them: A uniform within one over the root of its inputs, B zeros."""
        values = {}
        for name, target in self.targets.items():
            a, b = target.shapes(self.config.r)
            rng = np.random.default_rng((seed, zlib.crc32(name.encode())))
            bound = float(np.prod(a[2:])) ** -0.5
            values[f"lora.a.{name}"] = rng.uniform(-bound, bound, a).astype(np.float32)
            values[f"lora.b.{name}"] = np.zeros(b, np.float32)
        return values

    def product(self, parameters: Parameters) -> Product:
        """The decoder's products with the adapter's added."""
        matrices = {
            name: LowRank.of(
                target,
                (parameters[f"lora.a.{name}"] * self._mask(name, target)).astype(self.dtype),
                parameters[f"lora.b.{name}"].astype(self.dtype),
            )
            for name, target in self.targets.items()
        }
        return adapted_product(matrices, self.config.scale)

    def _mask(self, name: str, target: Target) -> np.ndarray:
        """Zero for modules that take no part: they share a parameter with one that does."""
        return np.array(self.chosen[name], np.float32).reshape(-1, *[1] * (len(target.shapes(1)[0]) - 1))

    def merged(self, parameters: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The weights that take the adapter, with its products added."""
        return {
            name: parameters[name].astype(np.float32)
            + np.float32(self.config.scale)
            * product_of(target, parameters[f"lora.a.{name}"] * self._mask(name, target), parameters[f"lora.b.{name}"])
            for name, target in self.targets.items()
        }

    def write(self, folder: Path, parameters: Mapping[str, np.ndarray]) -> None:
        """PEFT's files."""
        modules = {}
        for name, target in self.targets.items():
            for module, matrices in target.to_modules(
                parameters[f"lora.a.{name}"], parameters[f"lora.b.{name}"]
            ).items():
                if self.chosen[name][target.modules.index(module)]:
                    modules[module] = matrices
        write_peft(folder, modules, self.config)
