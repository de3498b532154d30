"""A text of any size as one mapped file of token ids, encoded piece by piece.

Files and a tokenizer -> ids on disk, and where documents end. A text is encoded once per run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxllm.tokenizer import Tokenizer
from jaxllm.training.data.files import is_plain_text, read_examples, read_text


@dataclass(frozen=True, slots=True)
class Corpus:
    """Token ids `[N]`, a mapped file, and the index after each document's last token (empty: one text)."""

    tokens: np.ndarray
    ends: np.ndarray

    def part(self, start: float, stop: float) -> Corpus:
        """The share from `start` to `stop`, at whole documents where there are some."""
        low, high = (self._cut(share) for share in (start, stop))
        ends = self.ends[(self.ends > low) & (self.ends <= high)] - low
        return Corpus(self.tokens[low:high], ends)

    def _cut(self, share: float) -> int:
        if not len(self.ends):
            return int(share * len(self.tokens))
        return int(np.concatenate([[0], self.ends])[round(share * len(self.ends))])


def texts_of(path: Path) -> Iterator[str]:
    """What a tokenizer is trained on."""
    return read_text(path) if is_plain_text(path) else (_words(example) for example in read_examples(path))


def _words(example) -> str:
    parts = [example.text, example.completion, *(turn.get("content") for turn in example.messages or ())]
    return "\n".join(part for part in parts if isinstance(part, str))


def encode_corpus(path: Path, tokenizer: Tokenizer, target: Path) -> Corpus:
    """Encode a file into `target`. Raises ValueError that names the file and line of what is wrong."""
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    target.parent.mkdir(parents=True, exist_ok=True)
    ends, total = [], 0
    with target.open("wb") as file:
        if is_plain_text(path):
            for piece in read_text(path):
                total += _write(file, tokenizer.encode(piece, add_special_tokens=False), dtype)
        else:
            for example in read_examples(path):
                if example.text is None or example.completion is not None:
                    raise ValueError(f"{example.place}: pretraining reads `text`; use task sft for this file")
                ids = tokenizer.encode(example.text, add_special_tokens=False)
                total += _write(file, ids + list(tokenizer.eos_token_ids[:1]), dtype)
                ends.append(total)
    return Corpus(np.memmap(target, dtype, "r"), np.array(ends, np.int64))


def _write(file, ids: list[int], dtype: np.dtype) -> int:
    file.write(np.array(ids, dtype).tobytes())
    return len(ids)
