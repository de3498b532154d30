"""The decoder without values: which parameters exist on this mesh, with shapes, dims, shardings and how each is kept.

Configuration and placement in; enough out to compile, to plan memory and to say what must be read.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.adapters.targets import Target, targets_of
from jaxllm.checkpoints import Checkpoint
from jaxllm.checkpoints.quantized import METHODS, method_of, quantized_tensors
from jaxllm.config import EngineConfig, ModelConfig
from jaxllm.config.quantization import Scheme
from jaxllm.families.registry import family_of
from jaxllm.models.decoder import Decoder
from jaxllm.ops.cpu import ffi
from jaxllm.sharding.mesh import Placement
from jaxllm.sharding.rules import check_divides, kv_copies, num_parts, vocab_padding
from jaxllm.weights.joined import Joined
from jaxllm.weights.quantized import Quantized
from jaxllm.weights.schemes import (
    ROUNDED,
    JoinedScheme,
    Schemes,
    asked_schemes,
    checkpoint_schemes,
    schemes_of,
    with_activations,
)
from jaxllm.weights.stored import MatmulBackend, Storage, choose_storage

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AbstractModel:
    """The decoder without values: graph and parameter variables as shapes, both fixed by config and placement.

    `schemes` say which parameters are quantised; `rounds`: from a checkpoint's numbers, while they are read. `draft` is
    the model that guesses its tokens ahead, if there is one, on the same mesh. `targets` are the parameters that take
    adapters, by the names of their products; none where adapters are off. `matmul`: whose kernels multiply, and so how
    matrices are kept (`jaxllm.weights.stored`); the shapes in `state` stay those of the matrices.
    """

    cfg: ModelConfig
    graph: Any
    state: Any
    placement: Placement
    kv_copies: int
    vocab_padding: int
    matmul: MatmulBackend = "xla"
    schemes: Schemes = field(default_factory=dict)
    rounds: bool = False
    draft: AbstractModel | None = None
    targets: Mapping[str, Target] = field(default_factory=dict)

    @functools.cached_property
    def parameters(self) -> Any:
        """The state as it is kept: arrays or stored matrices, as shapes with shardings."""

        def kept(path: Any, variable: Any) -> Any:
            storage = self.storage(path, variable)
            return variable.replace(storage.abstract(variable.get_value(), shardings[path].get_value()))

        shardings = dict(nnx.to_flat_state(self.shardings()))
        return nnx.map_state(kept, self.state)

    @property
    def is_packed(self) -> bool:
        """Whether the processor's own kernels multiply, with matrices in panels."""
        return self.matmul == "llvm"

    def leaves(self) -> list[Any]:
        """Every parameter's arrays as shapes, the draft's after the model's own."""
        return jax.tree.leaves(self.parameters) + (self.draft.leaves() if self.draft else [])

    def storage(self, path: tuple, variable: Any) -> Storage:
        """How a parameter is kept."""
        contracted, inputs = variable.get_metadata("contracted"), variable.get_metadata("inputs")
        return choose_storage(
            variable.get_value(),
            contracted,
            matmul=self.matmul,
            scheme=self.schemes.get(path),
            inputs=inputs,
        )

    def shardings(self) -> Any:
        """NamedShardings in the shape of the state; refuses sizes that do not divide."""

        def place(path: Any, variable: Any) -> Any:
            dims, shape = variable.get_metadata("dims"), variable.get_value().shape
            sharding = self.placement.sharding(*dims, parameter=True)
            name = ".".join(map(str, path))
            check_divides(name, shape, dims, tuple(sharding.spec), self.placement.sizes)
            for scheme in schemes_of(self.schemes.get(path)):
                _check_groups(name, variable, scheme, self.placement)
            return variable.replace(sharding)

        return nnx.map_state(place, self.state)

    def parameter_bytes_per_device(self) -> int:
        """Bytes that the parameters will take on each device, as they are kept."""
        leaves = self.leaves()
        return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def _check_groups(name: str, variable: Any, scheme: Scheme, placement: Placement) -> None:
    """Refuse groups that do not divide the inputs, and cuts of the mesh inside a group."""
    shape, dims, inputs = variable.get_value().shape, variable.get_metadata("dims"), variable.get_metadata("inputs")
    size = math.prod(shape[i] for i in inputs)
    unit = scheme.group or (2 if scheme.bits == 4 else 1)
    if size % unit:
        raise ValueError(f"{name}: {size} inputs do not divide into groups of {unit}")
    axes = next((axes for i in inputs if (axes := placement.spec(dims, parameter=True)[i])), None)
    if size // unit % (parts := num_parts(axes, placement.sizes)):
        legal = [n for n in range(1, 65) if size // unit % n == 0 and shape[inputs[0]] % n == 0]
        raise ValueError(
            f"{name}: mesh axis {axes}={parts} cuts inside one of the {size // unit} groups of {unit} inputs that "
            f"share a scale; use a size of {', '.join(map(str, legal))}"
        )


def abstract_model(
    cfg: ModelConfig, placement: Placement, dtype: jnp.dtype, *, canonical: bool = False
) -> AbstractModel:
    """Shapes of the decoder for this mesh: key/value heads repeated and vocabulary padded where the cut asks for it.

    `canonical` leaves both out: the shapes that do not depend on the mesh.
    """
    copies = 1 if canonical else kv_copies(cfg, placement.rules, placement.sizes)
    padding = 0 if canonical else vocab_padding(cfg, placement.rules, placement.sizes)
    model = nnx.eval_shape(lambda: Decoder(cfg, kv_copies=copies, vocab_padding=padding, dtype=dtype))
    graph, state = nnx.split(model)
    return AbstractModel(cfg, graph, state, placement, copies, padding)


def make_model(
    config: EngineConfig, model_config: ModelConfig, placement: Placement, checkpoint: Checkpoint | None = None
) -> AbstractModel:
    """The abstract decoder in the dtype asked for (bfloat16 unless told otherwise), quantised where it should be.

    `checkpoint` is what will be read, None where the parameters come from elsewhere.
    """
    name = "bfloat16" if config.dtype == "auto" else config.dtype
    model = abstract_model(model_config, placement, jnp.dtype(name))
    stored = {} if checkpoint is None else stored_schemes(config.quantization, model, checkpoint)
    schemes = with_activations(
        stored or asked_schemes(config.quantization, model.state, placement), config.activation_dtype
    )
    matmul = _matmul_backend(config, placement, quantized=bool(schemes))
    model = replace(model, schemes=schemes, rounds=not stored, matmul=matmul)
    return _without_slow(model) if stored and model.is_packed and config.quantization == "auto" else model


def _without_slow(model: AbstractModel) -> AbstractModel:
    """What the processor's kernels do not multiply quantised is expanded into panels, which they do."""
    variables = dict(nnx.to_flat_state(model.state))

    def is_slow(path: tuple, scheme: Scheme | JoinedScheme) -> bool:
        variable = variables[path]
        storage = model.storage(path, variable)
        parts = [part for _, part in storage.runs] if isinstance(storage, Joined) else [storage]
        asks = any(one.activations for one in schemes_of(scheme))
        return bool(variable.get_metadata("contracted")) and not asks and any(isinstance(p, Quantized) for p in parts)

    return replace(model, schemes={path: s for path, s in model.schemes.items() if not is_slow(path, s)})


def taking_adapters(model: AbstractModel, hf: Mapping[str, Any]) -> AbstractModel:
    """The model with its `targets`; `hf`, its configuration in Hugging Face's spelling, says how modules are called."""
    sources = family_of(hf).weight_map(model.cfg, model.kv_copies)
    in_panels = model.is_packed and not ffi.unavailable()
    return replace(model, targets=targets_of(sources, dict(nnx.to_flat_state(model.state)), in_panels=in_panels))


def stored_schemes(quantization: str, model: AbstractModel, checkpoint: Checkpoint) -> Schemes:
    """What is kept as the checkpoint has it. Raises ValueError where the flag names another method than its own."""
    tensors = quantized_tensors(checkpoint)
    method = method_of(checkpoint)
    if quantization in METHODS and quantization != method and quantization not in ROUNDED:
        raise ValueError(
            f"quantization={quantization!r}, but the checkpoint's is {method or 'none'}; leave it at auto to take "
            "the weights as they are"
        )
    if not tensors or quantization == "none" or (quantization in ROUNDED and quantization != method):
        return {}
    family = family_of(checkpoint.config)
    schemes = checkpoint_schemes(family.weight_map(model.cfg, model.kv_copies), model.state, tensors)
    if method == "gguf":
        schemes = {path: scheme for path, scheme in schemes.items() if _fits(model, path, scheme)}
    return schemes


def _fits(model: AbstractModel, path: tuple, scheme: Scheme | JoinedScheme) -> bool:
    """Whether the mesh cuts between groups; files that have always been expanded are expanded where it does not."""
    try:
        replace(
            model,
            state=nnx.from_flat_state([(path, dict(nnx.to_flat_state(model.state))[path])]),
            schemes={path: scheme},
        ).shardings()
    except ValueError as error:
        log.info("expanded while it is read: %s", error)
        return False
    return True


def _matmul_backend(config: EngineConfig, placement: Placement, *, quantized: bool) -> MatmulBackend:
    """Whose kernels multiply on one device alone. Raises ValueError where they are asked for and cannot."""
    mesh, asked = placement.mesh, config.matmul_backend
    platform = mesh.devices.flat[0].platform if mesh.size == 1 else ""
    if asked == "llvm" and platform != "cpu":
        raise ValueError("matmul_backend='llvm' is for one CPU device; use auto or xla")
    if asked == "xla" or platform not in ("cpu", "gpu", "cuda"):
        return "xla"
    if platform != "cpu":
        return "pallas_gpu"
    reason = ffi.unavailable(quantized=quantized)
    if reason and asked == "llvm":
        raise ValueError(f"matmul_backend='llvm' cannot run: {reason}; use auto or xla")
    return "xla" if reason else "llvm"
