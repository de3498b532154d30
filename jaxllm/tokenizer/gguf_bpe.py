"""Byte-level BPE from GGUF (`tokenizer.ggml.model = "gpt2"`).

Inputs: a `GgufVocab` with merges and the name of its splitting rule. Output: a `tokenizers.Tokenizer`.
A splitting rule that is not in the table is refused: a guessed one gives plausible but wrong ids.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxllm.tokenizer.gguf_vocab import GgufVocab, add_marked_tokens, surround_with_special_tokens

if TYPE_CHECKING:
    import tokenizers
    from tokenizers.pre_tokenizers import PreTokenizer

_log = logging.getLogger(__name__)

# Published splitting rules. They differ in how many digits make a word and how words take a prefix.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Splitting:
    """How text becomes words before merges apply."""

    pattern: str
    digits_apart: bool = False  # every digit is cut out before the pattern is applied
    nfc: bool = False  # compose accents first
    ignore_merges: bool = False  # a whole word that is in the vocabulary is taken as it is
    add_bos: bool = False  # unless the file says otherwise


_GPT2_STYLE = Splitting(pattern=_GPT2)
_DIGITS_APART = Splitting(pattern=_GPT2, digits_apart=True)
_LLAMA3 = Splitting(pattern=_CL100K.format(digits=r"\p{N}{1,3}"), ignore_merges=True, add_bos=True)
SPLITTINGS = {
    "default": _GPT2_STYLE,
    "gpt-2": _GPT2_STYLE,
    "phi-2": _GPT2_STYLE,
    "smollm": _DIGITS_APART,
    "starcoder": _DIGITS_APART,
    "refact": _DIGITS_APART,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": Splitting(pattern=_CL100K.format(digits=r"\p{N}"), nfc=True),
    "tekken": Splitting(pattern=_TEKKEN, ignore_merges=True, add_bos=True),
}


def byte_level_backend(vocab: GgufVocab) -> tokenizers.Tokenizer:
    """Raises ValueError for an unknown `tokenizer.ggml.pre` or malformed merges."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    splitting = _splitting(vocab.get("pre"))
    ids = {token: i for i, token in enumerate(vocab.tokens)}
    if len(ids) != len(vocab.tokens):
        raise ValueError("tokenizer.ggml.tokens has duplicates; expected distinct tokens; convert again")
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
        _log.warning("tokenizer.ggml.pre is missing; splitting as GPT-2 does, ids may differ from training")
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

    digits = [pre_tokenizers.Digits(individual_digits=True)] if splitting.digits_apart else []
    split = pre_tokenizers.Split(Regex(splitting.pattern), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*digits, split, to_bytes])
