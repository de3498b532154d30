"""The head of a sequence classifier (`*ForSequenceClassification`): `score.weight`, kept on the host.

A checkpoint -> `ClassifierHead` or None. It multiplies one vector per text, the final norm's output at the last token,
so no device is needed. Knows nothing of tokens.

Dimension letters: L labels, D model width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxllm.checkpoints import Checkpoint
from jaxllm.families.registry import HEAD_OF_CLASSIFIERS, is_classifier
from jaxllm.families.tensor_names import NamedCheckpoint


@dataclass(frozen=True, slots=True, eq=False)
class ClassifierHead:
    """What a classifier makes of a text's vector.

    Attributes:
        weight_LD: float32.
        labels: names, by number.
        is_exclusive: probabilities are a softmax over the labels; else each has a sigmoid of its own.
    """

    weight_LD: np.ndarray
    labels: tuple[str, ...]
    is_exclusive: bool

    def logits(self, vector_D: np.ndarray) -> np.ndarray:
        """One number for each label, `[L]`."""
        return self.weight_LD @ vector_D.astype(np.float32)

    def probs(self, logits_L: np.ndarray) -> np.ndarray:
        """Of the labels, `[L]`."""
        if not self.is_exclusive:
            return 1.0 / (1.0 + np.exp(-logits_L))
        odds = np.exp(logits_L - logits_L.max())
        return odds / odds.sum()


def read_classifier(checkpoint: Checkpoint | None) -> ClassifierHead | None:
    """The head of a checkpoint that is a classifier. Raises ValueError where it lacks its tensor."""
    if checkpoint is None or not is_classifier(checkpoint.config):
        return None
    raw = checkpoint
    while isinstance(raw, NamedCheckpoint):
        raw = raw.inner
    info, width = raw.tensors.get(HEAD_OF_CLASSIFIERS), _width(checkpoint.config)
    if info is None or len(info.shape) != 2 or (width and info.shape[1] != width):
        found = "none" if info is None else f"one of shape {tuple(info.shape)}"
        raise ValueError(f"a classifier has {HEAD_OF_CLASSIFIERS} of shape [labels, {width}]; here is {found}")
    weight = np.asarray(raw.read(HEAD_OF_CLASSIFIERS)).astype(np.float32)
    labels = _labels(checkpoint.config, weight.shape[0])
    is_exclusive = weight.shape[0] > 1 and checkpoint.config.get("problem_type") != "multi_label_classification"
    return ClassifierHead(weight, labels, is_exclusive)


def _width(hf: Any) -> int | None:
    return hf.get("hidden_size") or hf.get("n_embd")


def _labels(hf: Any, count: int) -> tuple[str, ...]:
    named = hf.get("id2label") or {}
    return tuple(str(named.get(str(i), named.get(i, f"LABEL_{i}"))) for i in range(count))
