"""Tokenizer of a GGUF file.

Inputs: the header's key-value metadata (`tokenizer.ggml.*`). Output: a `Tokenizer`. It does not read files
and does not know the model's tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from jaxllm.tokenizer.chat import DEFAULT
from jaxllm.tokenizer.end_tokens import with_named_end_tokens
from jaxllm.tokenizer.gguf_bpe import byte_level_backend
from jaxllm.tokenizer.gguf_sentencepiece import sentencepiece_backend
from jaxllm.tokenizer.gguf_vocab import GgufVocab, TokenType
from jaxllm.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    import tokenizers

_BACKENDS: dict[str, Callable[[GgufVocab], tokenizers.Tokenizer]] = {
    "gpt2": byte_level_backend,
    "llama": sentencepiece_backend,
}
_ID_KEYS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}

_HARMONY_ENDS = ("<|return|>", "<|call|>")


def tokenizer_from_metadata(metadata: Mapping[str, Any]) -> Tokenizer:
    """Build the tokenizer a GGUF header describes.

    Raises:
        ValueError: a kind of vocabulary that is not supported, or arrays that contradict each other.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in _BACKENDS:
        raise ValueError(
            f"tokenizer.ggml.model={kind!r} is not supported; use a file with one of: "
            f"{', '.join(sorted(_BACKENDS))}; or give the folder of the original model as tokenizer"
        )
    vocab = GgufVocab.from_metadata(metadata)
    ids = {name: vocab.named_id(key) for name, key in _ID_KEYS.items()}
    return Tokenizer(
        _BACKENDS[kind](vocab),
        bos_token_id=ids["bos_token"],
        eos_token_ids=_eos_token_ids(vocab),
        chat_templates=_chat_templates(metadata),
        special_tokens={name: vocab.tokens[i] for name, i in ids.items() if i is not None},
    )


def _chat_templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    """The default one, and those that the key names beside it (`tokenizer.chat_template.tool_use`)."""
    key = "tokenizer.chat_template"
    found = {name.removeprefix(key).lstrip("."): text for name, text in metadata.items() if name.startswith(key)}
    return {name or DEFAULT: text for name, text in found.items() if isinstance(text, str)}


def _eos_token_ids(vocab: GgufVocab) -> tuple[int, ...]:
    listed = [vocab.named_id(key) for key in ("eos", "eot", "eom")]
    # Only marked tokens end an answer: the same text as an ordinary token is something a user may quote.
    marked = (TokenType.CONTROL, TokenType.USER_DEFINED)
    by_text = {vocab.tokens[i]: i for i, kind in enumerate(vocab.types) if kind in marked}
    if by_text.keys() >= set(_HARMONY_ENDS):  # there <|end|> only ends a message inside the answer
        by_text.pop("<|end|>", None)
        listed += [by_text[text] for text in _HARMONY_ENDS]
    return with_named_end_tokens((i for i in listed if i is not None), by_text.get)
