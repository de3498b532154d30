"""A checkpoint's tensors under the names that its family expects, whatever the file calls them.

Checkpoint -> Checkpoint: tensors renamed, what generation does not use left out with one log line, and a configuration
that says of tied embeddings what the file holds. Nothing is read but two tables that may be equal.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxllm.checkpoints.base import Checkpoint, TensorInfo
from jaxllm.checkpoints.quantized import QuantizedTensor, method_of, quantized_tensors
from jaxllm.families.notices import say_once
from jaxllm.families.registry import HEAD_OF_CLASSIFIERS, Family, family_of, is_classifier
from jaxllm.families.sources import checkpoint_tensors
from jaxllm.families.text_half import eyes_of, text_config, text_name

if TYPE_CHECKING:
    import numpy as np

    from jaxllm.config import ModelConfig

_HEAD = "lm_head.weight"
_PIECE_ELEMENTS = 1 << 22  # of two tables compared at a time


@dataclass(frozen=True, slots=True)
class NamedCheckpoint:
    """See `Checkpoint`. `names` leads from a tensor's name here to its name in the file."""

    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]
    inner: Checkpoint
    names: Mapping[str, str]

    @property
    def path(self) -> Path:
        return self.inner.path

    @property
    def generation_config(self) -> dict[str, Any]:
        return self.inner.generation_config

    @property
    def method(self) -> str | None:
        """How the file's tensors are quantised."""
        return method_of(self.inner)

    @property
    def quantized(self) -> Mapping[str, QuantizedTensor]:
        """Those that the file keeps quantised."""
        inner = quantized_tensors(self.inner)
        return {ours: inner[theirs] for ours, theirs in self.names.items() if theirs in inner}

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        return self.inner.read(self.names[name], index)

    def release(self, name: str) -> None:
        self.inner.release(self.names[name])


def named(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint as its family expects it; tensors nobody expects keep their names, for the loader to refuse.

    With tied embeddings in the configuration and a head of its own in the file, transformers 5 compares the two: equal
    ones are tied, others are not. The same here, and `tie_word_embeddings` of the result says so.
    """
    if isinstance(checkpoint, NamedCheckpoint) or not checkpoint.tensors:
        return checkpoint
    if is_classifier(checkpoint.config):
        checkpoint = _without_labels(checkpoint)
    if eyes_of(checkpoint.config):
        checkpoint = _text_half(checkpoint)
    family = family_of(checkpoint.config)
    cfg = family.config(checkpoint.config)
    sources = family.weight_map(cfg, 1)
    names = _names(checkpoint.tensors, {name for name, _ in checkpoint_tensors(sources)} | {_HEAD}, family)
    _leave_out_extra_layers(names, checkpoint.config, cfg, family)
    config = checkpoint.config
    if cfg.tie_word_embeddings and _HEAD in names:
        config = _settle_head(checkpoint, names, sources["embedding",].parts[0].name)
    tensors = {name: checkpoint.tensors[theirs] for name, theirs in names.items()}
    return NamedCheckpoint(config, tensors, checkpoint, names)


def _without_labels(checkpoint: Checkpoint) -> Checkpoint:
    """The decoder of a classifier: it has no head over the vocabulary, so the embedding stands for one."""
    tensors = {name: info for name, info in checkpoint.tensors.items() if name != HEAD_OF_CLASSIFIERS}
    config = {**checkpoint.config, "tie_word_embeddings": True}
    return NamedCheckpoint(config, tensors, checkpoint, {name: name for name in tensors})


def _text_half(checkpoint: Checkpoint) -> Checkpoint:
    """What a checkpoint that also sees has for texts."""
    names = {ours: theirs for theirs in checkpoint.tensors if (ours := text_name(theirs)) is not None}
    tensors = {name: checkpoint.tensors[theirs] for name, theirs in names.items()}
    return NamedCheckpoint(dict(text_config(checkpoint.config)), tensors, checkpoint, names)


def _names(theirs: Iterable[str], expected: set[str], family: Family) -> dict[str, str]:
    """Name here -> name in the file: with or without the prefix of the model inside the causal LM."""
    given, names = set(theirs), {}
    for name in theirs:
        ours = name
        if name not in expected:
            candidates = (family.prefix + name, name.removeprefix(family.prefix))
            ours = next((c for c in candidates if c in expected and c not in given), name)
        names[ours] = name
    return names


def _leave_out_extra_layers(names: dict[str, str], hf: Mapping[str, Any], cfg: ModelConfig, family: Family) -> None:
    """Layers that predict several tokens at once: named so, or beyond the last layer.

    Of the latter as many as the file says, and those with the projection (`eh_proj`) that only such layers have.
    """
    pattern = re.compile(rf"(?:{re.escape(family.prefix)})?(?:layers\.(\d+)|(mtp(?:_layers|_block)?))\..*")
    beyond: dict[int | str, list[str]] = {}
    for name in names:
        if (match := pattern.fullmatch(name)) and (match[2] or int(match[1]) >= cfg.num_layers):
            beyond.setdefault(match[2] or int(match[1]), []).append(name)
    declared = hf.get("num_nextn_predict_layers", hf.get("num_mtp_layers"))
    last = cfg.num_layers + (declared if isinstance(declared, int) else 0)
    extra = [i for i, own in beyond.items() if isinstance(i, str) or i < last or any(".eh_proj." in n for n in own)]
    left_out = [name for i in extra for name in beyond[i]]
    for name in left_out:
        del names[name]
    if left_out:
        say_once(
            f"{len(left_out)} tensors of layers {', '.join(map(str, extra))} are ignored: they predict several tokens "
            f"at once, which generation here does not use (the model has {cfg.num_layers} layers)"
        )


def _settle_head(checkpoint: Checkpoint, names: dict[str, str], embedding: str) -> dict[str, Any]:
    """The configuration after looking at both tables; a head that equals the embedding is left out."""
    if embedding not in names:  # only one of the two was saved, under the other's name
        names[embedding] = names.pop(_HEAD)
        return checkpoint.config
    if _is_equal(checkpoint, names[embedding], names[_HEAD]):
        del names[_HEAD]
        return checkpoint.config
    say_once(
        f"config.json has tie_word_embeddings=true but {_HEAD} differs from {embedding}; the file's own head is used, "
        "as in transformers 5 (tie_word_embeddings=false says the same)"
    )
    return {**checkpoint.config, "tie_word_embeddings": False}


def _is_equal(checkpoint: Checkpoint, one: str, other: str) -> bool:
    """Compare two matrices a few rows at a time, up to the first that differ."""
    shape = checkpoint.tensors[one].shape
    if shape != checkpoint.tensors[other].shape or len(shape) != 2:
        return False
    step = max(1, _PIECE_ELEMENTS // max(1, shape[1]))
    for start in range(0, shape[0], step):
        rows = (slice(start, min(start + step, shape[0])), slice(0, shape[1]))
        if not (checkpoint.read(one, rows) == checkpoint.read(other, rows)).all():
            return False
    checkpoint.release(other)
    return True
