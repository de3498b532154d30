"""A checkpoint's linears rounded so that a text's hidden states change little, block after block (`gptq.py`).

A block's inputs are those that the blocks before it give once they are rounded themselves, so later blocks make up for
earlier ones. At any time one block's matrices exist, the Hessians of its products (of each expert's), and the hidden
states of the text.

Dimension letters: S spans, T tokens, K inputs, E experts.
"""

from __future__ import annotations

import itertools
import logging
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.checkpoints import Checkpoint
from jaxllm.weights.gptq import rounding_for
from jaxllm.weights.layerwise import Inputs, LayerwiseDecoder
from jaxllm.weights.quantize import Plan, stored_linear
from jaxllm.weights.rounding import Pieces, numbers_of

log = logging.getLogger(__name__)
_SPAN = 2048  # tokens that are attended together
_FEWEST = 128  # tokens that say anything about a matrix
DEFAULT_TOKENS = 32768


@dataclass(frozen=True, slots=True)
class Calibration:
    """A text of the kind that the model will meet: its first `num_tokens` tokens are looked at."""

    file: Path
    num_tokens: int = DEFAULT_TOKENS


def calibration_tokens(checkpoint: Checkpoint, calibration: Calibration) -> np.ndarray:
    """int32 `[S, T]`. Raises ValueError where the file or the model's tokenizer cannot be read, or it is too short."""
    from jaxllm.tokenizer import load_tokenizer

    file, limit = calibration.file, checkpoint.config.get("max_position_embeddings") or _SPAN
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise ValueError(f"cannot read the calibration text {file}: {reason}; name a text file") from error
    ids = load_tokenizer(checkpoint.path).encode(text)[: calibration.num_tokens]
    if len(ids) < _FEWEST:
        raise ValueError(f"{file} has {len(ids)} tokens; calibration needs {_FEWEST} at least, some thousands are good")
    span = min(_SPAN, limit, len(ids))
    return np.asarray(ids[: len(ids) // span * span], np.int32).reshape(-1, span)


def calibrated(checkpoint: Checkpoint, plan: Plan, tokens: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of all linears of the plan, block by block; a bar on a terminal says how far it is."""
    decoder = LayerwiseDecoder(checkpoint, tokens.shape[1])
    states = [decoder.embedded(batch) for batch in decoder.batches(tokens)]
    unseen: list[str] = []
    for layer in _with_bar(decoder.cfg.num_layers):
        made: dict[str, np.ndarray] = {}
        for name, pieces in _rounded_block(decoder, layer, plan, states, unseen):
            made[name] = numbers_of(pieces.codes, plan.scheme) * np.repeat(
                pieces.scales, pieces.codes.shape[1] // pieces.scales.shape[1], axis=1
            )
            yield from stored_linear(name, pieces, plan.scheme)

        def read(name: str, index: tuple[slice, ...], made: Mapping[str, np.ndarray] = made) -> np.ndarray:
            return made[name][index] if name in made else checkpoint.read(name, index)

        values = decoder.block(layer, read)
        states = [decoder.run(layer, values, x_TD)[0] for x_TD in states]
    if unseen:
        log.warning("%d linears are rounded to nearest: no text came to them, %s first", len(unseen), unseen[0])


def _with_bar(num_layers: int) -> Iterator[int]:
    if not sys.stderr.isatty():
        yield from range(num_layers)
        return
    from tqdm import tqdm

    yield from tqdm(range(num_layers), desc="jaxllm: calibrating", unit="block", file=sys.stderr)


def _rounded_block(
    decoder: LayerwiseDecoder, layer: int, plan: Plan, states: list[np.ndarray], unseen: list[str]
) -> Iterator[tuple[str, Pieces]]:
    """Every linear of a block, those of one Hessian after each other."""
    checkpoint, hessians = decoder.checkpoint, _hessians(decoder, layer, states)
    for path, owners in _owners(decoder, layer, plan).items():
        for expert, names in owners.items():
            hessian_KK = np.asarray(hessians.pop((path, expert), 0.0), np.float32)
            unseen += [] if hessian_KK.any() else names
            rounding = rounding_for(hessian_KK, plan.scheme)
            for name in names:
                yield name, rounding(np.asarray(checkpoint.read(name), np.float32))
                checkpoint.release(name)


def _owners(decoder: LayerwiseDecoder, layer: int, plan: Plan) -> dict[tuple, dict[int, list[str]]]:
    """Which tensors a parameter is made of: by its path below the block, and by expert (0 where there are none)."""
    found: dict[tuple, dict[int, list[str]]] = {}
    for path, source in decoder.sources.items():
        if path[:2] != ("layers", layer):
            continue
        inputs = decoder.inputs(path)
        for part in source.parts:
            if part.name in plan.linears:
                expert = part.start[0] if inputs and inputs[0] else 0
                names = found.setdefault(path[2:], {}).setdefault(expert, [])
                names += [] if part.name in names else [part.name]
    return found


def _hessians(decoder: LayerwiseDecoder, layer: int, states: list[np.ndarray]) -> dict[tuple[tuple, int], Any]:
    """float32 `[K, K]` of every product and expert (0: there are none): the sum of `x x^T` of what it was given."""
    values, total = decoder.block(layer), {}
    for x_TD in states:
        for path, inputs in decoder.run(layer, values, x_TD)[1].items():
            for expert, gram_KK in _grams(inputs):
                total[path, expert] = gram_KK + total.get((path, expert), 0)
    return total


def _grams(inputs: Inputs) -> Iterator[tuple[int, Any]]:
    if inputs.sizes_E is None:
        yield 0, _gram(inputs.rows)
        return
    rows = np.asarray(inputs.rows, np.float32)
    starts = np.cumsum([0, *np.asarray(inputs.sizes_E)])
    for expert, (start, end) in enumerate(itertools.pairwise(starts)):
        if start < end:
            yield expert, rows[start:end].T @ rows[start:end]


@jax.jit
def _gram(rows_TK: jax.Array) -> jax.Array:
    rows_TK = rows_TK.astype(jnp.float32)
    return jnp.einsum("TK,TL->KL", rows_TK, rows_TK, precision="highest")
