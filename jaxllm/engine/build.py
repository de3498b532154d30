"""From an `EngineConfig` to a running engine: resolve, check, load, allocate.

The one place where names, files, devices and sizes meet. Everything a user can get wrong is refused here or
when a request is added, in one line.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxllm.config import EngineConfig, ModelConfig
from jaxllm.families import read_config

if TYPE_CHECKING:
    from jaxllm.checkpoints import Checkpoint
    from jaxllm.engine.engine import Engine
    from jaxllm.runner.connections import Connection
    from jaxllm.sharding.mesh import Placement
    from jaxllm.tokenizer import Tokenizer
    from jaxllm.weights.loader import AbstractModel

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    """An engine and what its faces need beside it."""

    engine: Engine
    tokenizer: Tokenizer | None
    model_config: ModelConfig
    generation_config: dict


def build_engine(
    config: EngineConfig, *, progress: bool = True, on_stage: Callable[[str], None] | None = None
) -> BuiltEngine:
    """Load a model and start an engine. Raises ValueError with one line that says what to do.

    `on_stage` is told what is being done.
    """
    from jaxllm.sharding.rules import load_rules, parse_mesh

    parse_mesh(config.mesh)
    rules = load_rules(config.sharding_rules)
    connection = _join(config)
    say = on_stage or (lambda _: None)
    say(f"resolving {config.model}")
    source = _dummy(config, progress) if config.load_format == "dummy" else _weights(config, progress)
    model_config = read_config(source.hf_config)
    with ThreadPoolExecutor(1) as pool:  # the tokenizer is built while the weights are read
        tokenizer: Future[Tokenizer | None] = pool.submit(_tokenizer, config, source.path)

        from jaxllm.engine.engine import Engine
        from jaxllm.kv.offload import add_tiers
        from jaxllm.runner.memory_check import check_memory, out_of_memory_explained
        from jaxllm.runner.runner import ModelRunner
        from jaxllm.runner.shapes import make_memory, runner_shapes
        from jaxllm.sharding.mesh import Placement, make_mesh

        use_compilation_cache()
        model = make_model(config, model_config, Placement(make_mesh(config.mesh, offset=config.device_offset), rules))
        shapes = runner_shapes(config, model, connection)
        check_memory(model, shapes)
        longest = _say_length_scaling(model_config, shapes.max_model_len)
        identity = model_identity(config, source.hf_config, source.path, longest)
        memory = make_memory(model, shapes, enable_prefix_caching=config.enable_prefix_caching, namespace=identity)
        runner = ModelRunner(model, shapes, memory, announce=connection.announce)
        runner.compiler.prepare()  # programs compile while the weights are read
        say(f"loading {source.path.name if source.path else config.model}")
        with out_of_memory_explained(model, shapes):
            params = _parameters(config, source, model)
        generation = source.checkpoint.generation_config if source.checkpoint else {}
        hf = source.hf_config
        del source  # unmaps the files before the cache is allocated
        with out_of_memory_explained(model, shapes):
            runner.start(params)
        connection.start(runner.obey)  # does not return on any process but the first
        text = tokenizer.result()
    add_tiers(memory, config, runner, identity)
    engine = Engine(runner, memory=memory, eos_token_ids=_eos_token_ids(hf, generation, text), seed=config.seed)
    return BuiltEngine(engine, text, model_config, generation)


def _join(config: EngineConfig) -> Connection:
    from jaxllm.runner.connections import Alone
    from jaxllm.runner.members import member_of

    if (member := member_of(config)) is None:
        return Alone()
    from jaxllm.runner.processes import join

    return join(member, config)


def _say_length_scaling(cfg: ModelConfig, longest: int) -> int | None:
    """Where rotary embeddings depend on the longest sequence served: that length, after a line in the log."""
    if (scaling := cfg.length_scaling) is None:
        return None
    original = scaling.original_max_position
    if longest > original:
        log.warning(
            "max_model_len=%d is beyond the %d tokens of the first training: all sequences get the rotary embeddings "
            "of long ones; max_model_len=%d gives those of short ones",
            longest, original, original,
        )  # fmt: skip
    return longest


def model_identity(config: EngineConfig, hf: dict, path: Path | None, longest: int | None = None) -> str:
    """What decides the keys and values of given tokens: configuration, weights (by their files) and dtypes.

    `longest` is `max_model_len` where rotary embeddings depend on it. The sharding does not matter: what one mesh has
    cached, another may read.
    """
    from jaxllm.checkpoints import model_files

    files = [] if path is None else model_files(path)
    stats = [(str(f.relative_to(path.parent)), (s := f.stat()).st_size, s.st_mtime_ns) for f in files if path]
    seed = config.seed if config.load_format == "dummy" else None
    facts = (hf, stats, seed, config.dtype, config.kv_dtype, *([] if longest is None else [longest]))
    name = config.model if path is None else path.name
    return f"{name} {hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]}"


@dataclass(frozen=True, slots=True)
class _Model:
    """What a model's name led to; no checkpoint means random weights, no path that there are no files at all."""

    hf_config: dict
    path: Path | None
    checkpoint: Checkpoint | None


def _weights(config: EngineConfig, progress: bool) -> _Model:
    from jaxllm.checkpoints import open_checkpoint, resolve_model
    from jaxllm.families.presets import PRESETS
    from jaxllm.families.tensor_names import named

    if config.model in PRESETS and not os.path.exists(config.model):
        raise ValueError(
            f"{config.model!r} is a configuration without weights; pass a folder, a .gguf file or a Hugging Face id, "
            "or load_format='dummy' (--load-format dummy) for random weights"
        )
    path = resolve_model(config.model, progress=progress)
    checkpoint = named(open_checkpoint(path))
    return _Model(checkpoint.config, path, checkpoint)


def _parameters(config: EngineConfig, source: _Model, model: AbstractModel) -> Any:
    from jaxllm.weights.loader import load_parameters, random_parameters
    from jaxllm.weights.orbax import is_orbax, restore_parameters

    if source.checkpoint is None:
        return random_parameters(model, config.seed)
    if is_orbax(source.checkpoint.path):
        return restore_parameters(model, source.checkpoint.path)
    return load_parameters(model, source.checkpoint)


def _dummy(config: EngineConfig, progress: bool) -> _Model:
    from jaxllm.checkpoints import resolve_model
    from jaxllm.families.presets import PRESETS, hf_config

    path = None if config.model in PRESETS else resolve_model(config.model, progress=progress)
    return _Model(hf_config(config.model), path, None)


def use_compilation_cache() -> None:
    """Keep compiled programs on disk between processes, unless the user chose a place or none."""
    import jax

    from jaxllm.checkpoints import cache_home

    if "JAX_COMPILATION_CACHE_DIR" in os.environ or jax.config.values.get("jax_compilation_cache_dir"):
        return
    jax.config.update("jax_compilation_cache_dir", str(cache_home() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def make_model(config: EngineConfig, model_config: ModelConfig, placement: Placement) -> AbstractModel:
    """The abstract decoder in the dtype asked for; bfloat16 unless told otherwise."""
    import jax.numpy as jnp

    from jaxllm.weights.loader import abstract_model

    name = "bfloat16" if config.dtype == "auto" else config.dtype
    return abstract_model(model_config, placement, jnp.dtype(name), is_packed=_packs(config, placement))


def _packs(config: EngineConfig, placement: Placement) -> bool:
    """Whether the processor's own kernels multiply. Raises ValueError where they are asked for and cannot."""
    from jaxllm.ops.cpu import ffi

    mesh = placement.mesh
    if mesh.size > 1 or mesh.devices.flat[0].platform != "cpu":
        if config.matmul_backend == "llvm":
            raise ValueError("matmul_backend='llvm' is for one CPU device; use auto or xla")
        return False
    if config.matmul_backend == "xla":
        return False
    reason = ffi.unavailable()
    if reason and config.matmul_backend == "llvm":
        raise ValueError(f"matmul_backend='llvm' cannot run: {reason}; use auto or xla")
    return not reason


def _tokenizer(config: EngineConfig, path: Path | None) -> Tokenizer | None:
    if config.skip_tokenizer_init or (path is None and config.tokenizer is None):
        return None
    from jaxllm.checkpoints import resolve_model
    from jaxllm.tokenizer import ChatOptions, load_tokenizer

    if config.tokenizer:
        path = resolve_model(config.tokenizer)
    assert path is not None
    variables, sanitize = config.default_chat_template_kwargs or {}, config.sanitize_control_tokens
    options = ChatOptions(template=config.chat_template, variables=variables, sanitize_control_tokens=sanitize)
    return load_tokenizer(path, options)


def _eos_token_ids(hf: dict, generation: dict, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """Every id that ends an answer: the generation config's, the model's and the tokenizer's."""
    ids: list[int] = list(tokenizer.eos_token_ids) if tokenizer else []
    for source in (generation, hf):
        value = source.get("eos_token_id")
        ids += value if isinstance(value, list) else [] if value is None else [value]
    return tuple(dict.fromkeys(ids))[:8]
