"""One configuration with two meshes -> two engines on disjoint devices, as one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from jaxllm.adapters.slots import laid_anew
from jaxllm.adapters.store import ReadyAdapter
from jaxllm.config import EngineConfig
from jaxllm.config.kv_events import KVEventsConfig
from jaxllm.config.kv_transfer import KVTransferConfig
from jaxllm.disaggregation.events import KVEvents
from jaxllm.disaggregation.exchange import Exchange
from jaxllm.disaggregation.pools import PrefillDecode
from jaxllm.engine.build import BuiltEngine, build_engine
from jaxllm.engine.engine import Engine
from jaxllm.scheduling.adapter_slots import Adapter
from jaxllm.sharding.rules import parse_mesh


def build_pools(
    config: EngineConfig, *, progress: bool = True, on_stage: Callable[[str], None] | None = None
) -> BuiltEngine:
    """Load a model into both pools; see `build_engine`."""
    prefill, decode = pool_configs(config)
    # The decode pool first: its devices are the last ones, and emulated devices are made for whoever comes first.
    built = build_engine(decode, progress=progress, on_stage=on_stage, receives=True)
    longest = built.engine.runner.shapes.max_model_len
    prefill = dataclasses.replace(prefill, max_model_len=longest, skip_tokenizer_init=True)
    first = build_engine(prefill, progress=progress, on_stage=on_stage)
    first.engine.eos_token_ids = built.engine.eos_token_ids
    _share_adapters(first.engine, built.engine)
    return dataclasses.replace(built, engine=PrefillDecode(first.engine, built.engine))


def _share_adapters(prefill: Engine, decode: Engine) -> None:
    """Adapters are made ready once, for the decode pool; the prefill pool's mesh may want their arrays otherwise."""
    ours, theirs = prefill.runner.model.targets, decode.runner.model.targets

    def form(adapter: Adapter) -> Adapter:
        return ReadyAdapter("", adapter.identity, laid_anew(adapter.arrays, theirs, ours))

    prefill.scheduler.adapter_slots.form = form


def build_alone(
    config: EngineConfig, *, progress: bool = True, on_stage: Callable[[str], None] | None = None
) -> BuiltEngine:
    """One engine, as `build_engine`; others may hand requests over to it where the configuration says so."""
    receives = config.kv_transfer_config is not None
    return build_engine(config, progress=progress, on_stage=on_stage, receives=receives)


def exchange_of(config: EngineConfig, built: BuiltEngine) -> Exchange | None:
    """What hands requests over to other processes, where the configuration asks for it."""
    if config.kv_transfer_config is None:
        return None
    return Exchange(built.engine, KVTransferConfig.from_json(config.kv_transfer_config), built.weights)


def events_of(config: EngineConfig, built: BuiltEngine) -> KVEvents | None:
    """What tells routers of the prefix cache, where the configuration asks for it; of two pools the decode pool's."""
    if config.kv_events_config is None or not (wanted := KVEventsConfig.from_json(config.kv_events_config)).is_on:
        return None
    return KVEvents(wanted, built.engine.memory.pools)


def pool_configs(config: EngineConfig) -> tuple[EngineConfig, EngineConfig]:
    """What each pool's engine is given. The prefill pool has the first devices, and nothing below its pages."""
    assert config.prefill_mesh is not None and config.decode_mesh is not None
    names = [f.name for f in dataclasses.fields(config) if f.name.startswith("prefill_") and f.name != "prefill_mesh"]
    given = {name.removeprefix("prefill_"): value for name in names if (value := getattr(config, name)) is not None}
    alone = dataclasses.replace(config, prefill_mesh=None, decode_mesh=None, **dict.fromkeys(names))
    offset = config.device_offset + math.prod(parse_mesh(config.prefill_mesh).values())
    below = {"host_kv_bytes": 0, "disk_kv_bytes": 0, "disk_kv_path": None, "preemption_mode": "recompute"}
    prefill = dataclasses.replace(alone, mesh=config.prefill_mesh, speculative_config=None, **given, **below)
    return prefill, dataclasses.replace(alone, mesh=config.decode_mesh, device_offset=offset)
