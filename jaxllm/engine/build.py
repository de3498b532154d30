"""From an `EngineConfig` to a running engine: resolve, check, load, allocate.

The one place where names, files, devices and sizes meet. Everything a user can get wrong is refused here or
when a request is added, in one line.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxllm.config import EngineConfig, ModelConfig
from jaxllm.families import read_config

if TYPE_CHECKING:
    from jaxllm.adapters.store import AdapterStore
    from jaxllm.engine.engine import Engine
    from jaxllm.runner.compiler import Compiler
    from jaxllm.runner.connections import Connection
    from jaxllm.runner.shapes import RunnerShapes
    from jaxllm.tokenizer import Tokenizer
    from jaxllm.weights.abstract import AbstractModel
    from jaxllm.weights.classifier import ClassifierHead
    from jaxllm.weights.source import ModelSource

log = logging.getLogger(__name__)


def _no_adapters() -> AdapterStore:
    from jaxllm.adapters.store import AdapterStore

    return AdapterStore({}, 1, 1)


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    """An engine and what its faces need beside it; `weights` names these on every machine, where that is needed."""

    engine: Engine
    tokenizer: Tokenizer | None
    model_config: ModelConfig
    generation_config: dict
    weights: str = ""
    adapters: AdapterStore = field(default_factory=_no_adapters)
    classifier: ClassifierHead | None = None


def build_engine(
    config: EngineConfig,
    *,
    progress: bool = True,
    on_stage: Callable[[str], None] | None = None,
    on_sized: Callable[[AbstractModel, RunnerShapes], Compiler | None] | None = None,
    receives: bool = False,
) -> BuiltEngine:
    """Load a model and start an engine. Raises ValueError with one line that says what to do.

    Args:
        config: what to build.
        progress: bars on a terminal.
        on_stage: told what is being done.
        on_sized: told what the engine will take, before it takes anything; may wait, may refuse with an error, and may
            give the compiler of another engine with the same programs.
        receives: others hand requests with their pages over to it.
    """
    from jaxllm.sharding.rules import load_rules, parse_mesh

    parse_mesh(config.mesh)
    rules = load_rules(config.sharding_rules)
    connection = _join(config)
    say = on_stage or (lambda _: None)
    say(f"resolving {config.model}")
    from jaxllm.weights.source import (  # loads JAX: after the processes have met
        content_identity,
        model_identity,
        open_source,
    )

    source = open_source(config, progress=progress)
    model_config = read_config(source.hf_config)
    with ThreadPoolExecutor(1) as pool:  # the tokenizer is built while the weights are read
        tokenizer: Future[Tokenizer | None] = pool.submit(_tokenizer, config, source.path)

        from jaxllm.adapters.store import AdapterStore
        from jaxllm.engine.engine import Engine
        from jaxllm.kv.offload import add_tiers, check_tiers
        from jaxllm.runner.compiler import use_compilation_cache
        from jaxllm.runner.memory_check import check_memory, out_of_memory_explained
        from jaxllm.runner.runner import ModelRunner
        from jaxllm.runner.shapes import make_memory, runner_shapes
        from jaxllm.sharding.mesh import Placement, make_mesh
        from jaxllm.weights.abstract import make_model, taking_adapters
        from jaxllm.weights.classifier import read_classifier

        use_compilation_cache()
        placement = Placement(make_mesh(config.mesh, offset=config.device_offset), rules)
        model = make_model(config, model_config, placement, source.checkpoint)
        model = taking_adapters(model, source.hf_config) if config.enable_lora else model
        model, draft_source = _with_draft(config, model)
        shapes = runner_shapes(config, model, connection)
        compiler = on_sized(model, shapes) if on_sized is not None else None
        check_memory(model, shapes)
        longest = _say_length_scaling(model_config, shapes.max_model_len)
        identity = model_identity(config, source.hf_config, source.path, longest)
        weights = content_identity(config, source.hf_config, source.path, longest) if config.kv_transfer_config else ""
        memory = make_memory(model, shapes, enable_prefix_caching=config.enable_prefix_caching, namespace=identity)
        check_tiers(memory, config)
        runner = ModelRunner(model, shapes, memory, announce=connection.announce, compiler=compiler)
        runner.compiler.prepare()  # programs compile while the weights are read
        say(f"loading {source.path.name if source.path else config.model}")
        with out_of_memory_explained(model, shapes):
            params = source.parameters(model)
            if draft_source is not None and model.draft is not None:
                params = (params, draft_source.parameters(model.draft))
        hf, generation = source.hf_config, source.generation_config
        classifier = read_classifier(source.checkpoint)
        del source, draft_source  # unmaps the files before the cache is allocated
        with out_of_memory_explained(model, shapes):
            runner.start(params)
        connection.start(runner.obey)  # does not return on any process but the first
        text = tokenizer.result()
    add_tiers(memory, config, runner.host_pages(), identity, receives=receives)
    engine = Engine(runner, memory=memory, eos_token_ids=_eos_token_ids(hf, generation, text), seed=config.seed)
    adapters = AdapterStore(model.targets, config.max_lora_rank, config.max_cpu_loras or config.max_loras)
    return BuiltEngine(engine, text, model_config, generation, weights, adapters, classifier)


def read_parameters(config: EngineConfig, built: BuiltEngine) -> Any:
    """The parameters that `config.model` has now, with its draft model's, for an engine that is built already.

    Raises ValueError where they are of another architecture or size.
    """
    from jaxllm.weights.source import open_source

    model = built.engine.runner.model
    source = open_source(config, progress=False)
    found = read_config(source.hf_config)
    if found != built.model_config:
        names = [
            f.name for f in dataclasses.fields(found) if getattr(found, f.name) != getattr(built.model_config, f.name)
        ]
        raise ValueError(
            f"{config.model!r} is another kind of model ({', '.join(names)} differ); weights can only be replaced by "
            "those of the same configuration"
        )
    params = source.parameters(model)
    _, draft_source = _with_draft(config, model)
    if draft_source is None or model.draft is None:
        return params
    return params, draft_source.parameters(model.draft)


def _with_draft(config: EngineConfig, model: AbstractModel) -> tuple[AbstractModel, ModelSource | None]:
    """The model with the one that drafts for it, where the configuration names one, and where that comes from."""
    from jaxllm.weights.abstract import make_model
    from jaxllm.weights.source import open_source

    if config.speculative is None or config.speculative.model is None:
        return model, None
    own = dataclasses.replace(config, model=config.speculative.model, speculative_config=None, quantization="auto")
    source = open_source(own, progress=False)
    cfg = read_config(source.hf_config)
    if cfg.vocab_size != model.cfg.vocab_size:
        raise ValueError(
            f"the draft model {own.model} has a vocabulary of {cfg.vocab_size} tokens and the model one of "
            f"{model.cfg.vocab_size}; a draft model needs the same tokenizer"
        )
    return dataclasses.replace(model, draft=make_model(own, cfg, model.placement, source.checkpoint)), source


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
            longest,
            original,
            original,
        )
    return longest


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
