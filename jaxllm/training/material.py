"""The data of one run: files -> batches for training, evaluation and the final test, by task.

Everything that is wrong with a file is said here, before anything is compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxllm.tokenizer import Tokenizer
from jaxllm.training.config import TrainConfig
from jaxllm.training.data.batches import Batches, Packed, Stream
from jaxllm.training.data.corpus import Corpus, encode_corpus
from jaxllm.training.data.documents import Document, instruction_document, label_document, share_counted
from jaxllm.training.data.files import Example, Splits, read_examples

_ROUND = 16  # tokens to which the longest document is rounded up for a span


@dataclass(frozen=True, slots=True)
class Material:
    """What a run reads.

    Attributes:
        train, valid, test: None where nothing was held out.
        span: tokens that are attended together.
        labels: of a classifier, else None.
        prompt: tokens of a held-out example's question, for samples; None where there is none.
        notes: lines to say about it.
    """

    train: Batches
    valid: Batches | None
    test: Batches | None
    span: int
    labels: dict[str, int] | None
    prompt: np.ndarray | None
    notes: tuple[str, ...]


def load_material(config: TrainConfig, files: Splits, tokenizer: Tokenizer, limit: int, work: Path) -> Material:
    """Read everything.

    Args:
        limit: the longest span that the model takes.
        work: a folder for encoded text.

    Raises:
        ValueError: one line that names the file and line of what is wrong, or what does not fit.
    """
    if config.context_length and config.context_length > limit:
        raise ValueError(f"context_length={config.context_length} is beyond the model's {limit} positions; lower it")
    return (_stream if config.task == "pretrain" else _documents)(config, files, tokenizer, limit, work)


def _stream(config: TrainConfig, files: Splits, tokenizer: Tokenizer, limit: int, work: Path) -> Material:
    span = config.context_length or min(limit, 1024)

    def encoded(path: Path | None, name: str) -> Corpus | None:
        return encode_corpus(path, tokenizer, work / f"{name}.bin") if path else None

    train, valid, test = (
        encoded(path, name) for path, name in ((files.train, "train"), (files.valid, "valid"), (files.test, "test"))
    )
    assert train is not None
    shares = (0.0 if valid else config.eval_fraction, 0.0 if test else config.test_fraction)
    whole, kept = train, 1 - sum(shares)
    train = whole.part(0.0, kept)
    valid = valid or (whole.part(kept, kept + shares[0]) if shares[0] else None)
    test = test or (whole.part(kept + shares[0], 1.0) if shares[1] else None)
    if len(train.tokens) <= span:
        raise ValueError(
            f"{files.train}: has {len(train.tokens)} tokens to train on, fewer than one span of "
            f"context_length={span}; lower it"
        )
    make: Callable[[Corpus | None], Stream | None] = lambda part: (
        Stream(part.tokens, part.ends, spans=config.spans, span=span, seed=config.seed)
        if part is not None and len(part.tokens) > span
        else None
    )
    stream = make(train)
    assert stream is not None
    held = len(valid.tokens) if valid else 0
    note = f"{len(train.tokens)} tokens to train on, {held} held out, vocabulary of {tokenizer.vocab_size}"
    return Material(stream, make(valid), make(test), span, None, None, (note,))


def _documents(config: TrainConfig, files: Splits, tokenizer: Tokenizer, limit: int, work: Path) -> Material:
    examples = {
        name: list(read_examples(path))
        for name, path in (("train", files.train), ("valid", files.valid), ("test", files.test))
        if path
    }
    labels = _labels(examples["train"]) if config.task == "classify" else None
    if config.balance_labels:
        examples["train"] = _balanced(examples["train"], config.seed)
    examples = _split(examples, config)
    make: Callable[[Example], Document] = (
        (lambda example: label_document(example, tokenizer, labels))
        if labels is not None
        else (lambda example: instruction_document(example, tokenizer))
    )
    documents = {name: [make(example) for example in some] for name, some in examples.items()}
    longest = max(len(d.tokens) for some in documents.values() for d in some)
    span = config.context_length or min(limit, -(-longest // _ROUND) * _ROUND)
    packed = {
        name: Packed(some, spans=config.spans, span=span, seed=config.seed) for name, some in documents.items() if some
    }
    counts = ", ".join(f"{len(some)} {name}" for name, some in documents.items())
    notes = [f"examples: {counts}; spans of {span} tokens"]
    if labels is None:
        notes.append(f"loss on {share_counted(documents['train']):.1%} of the tokens: what the assistant says")
    else:
        notes.append(f"labels: {', '.join(labels)}")
    prompt = documents["valid"][0].prompt if documents.get("valid") and labels is None else None
    return Material(packed["train"], packed.get("valid"), packed.get("test"), span, labels, prompt, tuple(notes))


def _labels(examples: Sequence[Example]) -> dict[str, int]:
    names = sorted({example.label for example in examples if example.label is not None})
    if len(names) < 2:
        raise ValueError(f"{examples[0].place}: classification needs at least two labels; got {names or 'none'}")
    return {name: i for i, name in enumerate(names)}


def _balanced(examples: list[Example], seed: int) -> list[Example]:
    """As many of every label as the rarest has, drawn by the seed, in the file's order."""
    by_label: dict[str | None, list[int]] = {}
    for i, example in enumerate(examples):
        by_label.setdefault(example.label, []).append(i)
    few = min(map(len, by_label.values()))
    rng = np.random.default_rng((seed, few))
    kept = np.concatenate([rng.permutation(some)[:few] for some in by_label.values()])
    return [examples[i] for i in sorted(kept)]


def _split(examples: dict[str, list[Example]], config: TrainConfig) -> dict[str, list[Example]]:
    """Cut what is held out from the training examples, drawn by the seed, where it has no file of its own."""
    everything = examples["train"]
    order = np.random.default_rng((config.seed, len(everything))).permutation(len(everything))
    cut, result = 0, {}
    for name, share in (("valid", config.eval_fraction), ("test", config.test_fraction)):
        if name in examples:
            result[name] = examples[name]
        elif share:
            count = max(1, round(share * len(everything)))
            result[name] = [everything[i] for i in sorted(order[cut : cut + count])]
            cut += count
    left = [everything[i] for i in sorted(order[cut:])]
    if not left:
        raise ValueError(f"{everything[0].place}: {len(everything)} examples are too few to hold some out; add more")
    return {"train": left, **result}
