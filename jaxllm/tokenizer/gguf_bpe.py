"""Byte-level BPE from GGUF (`tokenizer.ggml.model = "gpt2"`).

Inputs: a `GgufVocab` with merges and the name of its splitting rule. Output: a `tokenizers.Tokenizer`.
How text is cut into words is in gguf_splitting.py.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from jaxllm.tokenizer.gguf_splitting import SPLITTINGS, Splitting
from jaxllm.tokenizer.gguf_vocab import GgufVocab, add_marked_tokens, surround_with_special_tokens

if TYPE_CHECKING:
    import tokenizers
    from tokenizers.pre_tokenizers import PreTokenizer

_log = logging.getLogger(__name__)


def byte_level_backend(vocab: GgufVocab) -> tokenizers.Tokenizer:
    """Raises ValueError for an unknown `tokenizer.ggml.pre` or malformed merges."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    splitting = _splitting(vocab.get("pre"))
    ids = {token: i for i, token in enumerate(vocab.tokens)}
    try:
        bpe = models.BPE(ids, _merges(vocab), ignore_merges=splitting.ignore_merges)
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"tokenizer.ggml.merges does not fit the tokens: {error}; convert again") from None
    backend = Tokenizer(bpe)
    if splitting.nfc:
        backend.normalizer = normalizers.NFC()  # pyright: ignore
    backend.pre_tokenizer = _pre_tokenizer(splitting)  # pyright: ignore
    backend.decoder = decoders.ByteLevel()  # pyright: ignore
    add_marked_tokens(backend, vocab)
    surround_with_special_tokens(backend, vocab, add_bos=splitting.add_bos)
    return backend


def _splitting(name: str | None) -> Splitting:
    if name is None:
        _log.warning("tokenizer.ggml.pre is missing; splitting as llama.cpp does then, ids may differ from training")
        name = "default"
    if name not in SPLITTINGS:
        raise ValueError(
            f"tokenizer.ggml.pre={name!r} is not supported; expected one of {', '.join(SPLITTINGS)}; "
            "give the folder of the original model as tokenizer"
        )
    return SPLITTINGS[name]


def _merges(vocab: GgufVocab) -> list[tuple[str, str]]:
    merges = [tuple(merge.split(" ")) for merge in vocab.array("merges")]
    for merge in merges:
        if len(merge) != 2:
            got = " ".join(merge)
            raise ValueError(f"tokenizer.ggml.merges has {got!r}; expected two tokens; convert again")
    return merges  # pyright: ignore[reportReturnType]


def _pre_tokenizer(splitting: Splitting) -> PreTokenizer:
    from tokenizers import Regex, pre_tokenizers

    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in splitting.patterns]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
