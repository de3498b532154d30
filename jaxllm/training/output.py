"""What a run leaves: a Hugging Face folder that transformers, vLLM and `jaxllm serve` load.

Parameters by name and where they came from -> config.json, generation_config.json, safetensors, tokenizer, template.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxllm.families import family_of, read_config
from jaxllm.families.text_half import text_config
from jaxllm.tokenizer.save_folder import save_tokenizer
from jaxllm.training.loss import name_of
from jaxllm.training.origin import Origin
from jaxllm.weights.tensor_files import taken_apart, write_tensors


def write_model(
    folder: Path, origin: Origin, parameters: Mapping[str, np.ndarray], dtype: str, labels: Mapping[str, int] | None
) -> None:
    """Write the model.

    Args:
        parameters: of the decoder, by name, whole; and `score` `[labels, D]` of a classifier.
        dtype: of the files' matrices.
        labels: of a classifier, else None.

    Raises:
        ValueError: the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        config = _config(origin, dtype, labels)
        _write_json(folder / "config.json", config)
        _write_json(folder / "generation_config.json", _generation(origin))
        save_tokenizer(origin.tokenizer, folder, max_length=read_config(origin.hf).max_position_embeddings)
        write_tensors(_tensors(origin, parameters, dtype, labels), folder)
    except OSError as error:
        raise ValueError(f"cannot write {folder}: {error.strerror or error}; name a place with room") from error


def _config(origin: Origin, dtype: str, labels: Mapping[str, int] | None) -> dict[str, Any]:
    config = {key: value for key, value in text_config(origin.hf).items() if key not in ("torch_dtype", "dtype")}
    config["dtype"] = dtype
    if labels is not None:
        (name,) = config["architectures"]
        base = name.removesuffix("LMHeadModel").removesuffix("ForCausalLM")
        config["architectures"] = [f"{base}ForSequenceClassification"]
        config["id2label"] = {str(i): label for label, i in labels.items()}
        config["label2id"] = dict(labels)
        config["problem_type"] = "single_label_classification"
        if config.get("pad_token_id") is None:
            config["pad_token_id"] = origin.tokenizer.eos_token_ids[0]
    return config


def _generation(origin: Origin) -> dict[str, Any]:
    own = dict(origin.source.generation_config) if origin.source else {}
    ends = list(origin.tokenizer.eos_token_ids)
    own["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    for name in ("bos_token_id", "pad_token_id"):
        if (value := origin.hf.get(name)) is not None:
            own[name] = value
    return own


def _tensors(
    origin: Origin, parameters: Mapping[str, np.ndarray], dtype: str, labels: Mapping[str, int] | None
) -> Iterator[tuple[str, np.ndarray]]:
    import jax.numpy as jnp

    family, cfg = family_of(origin.hf), read_config(origin.hf)
    sources = family.weight_map(cfg, 1)
    if labels is not None:
        sources.pop(("lm_head",), None)
        yield "score.weight", parameters["score"].astype(jnp.dtype(dtype))
    values = {path: parameters[name_of(path)] for path in sources}
    for table in ("embedding", "lm_head"):
        if (table,) in values:
            values[table,] = values[table,][: cfg.vocab_size]  # without the rows that pad it
    for name, tensor in taken_apart(values, sources):
        yield name, tensor.astype(jnp.dtype(dtype))


def on_host(parameters: Mapping[str, jax.Array]) -> dict[str, np.ndarray]:
    """Whole arrays, in every process."""
    if jax.process_count() == 1:
        return {name: np.asarray(value) for name, value in parameters.items()}
    from jax.experimental.multihost_utils import process_allgather

    return {name: np.asarray(process_allgather(value, tiled=True)) for name, value in parameters.items()}


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
