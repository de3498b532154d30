"""The vocabulary arrays of a GGUF header, checked.

Inputs: metadata. Outputs: `GgufVocab`, and the two steps every kind of vocabulary shares: added tokens and
the tokens put around a text. It does not know how text is split.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tokenizers

_log = logging.getLogger(__name__)
# Ids that a model works without: a wrong one is left out, as llama.cpp does.
_DISPENSABLE = frozenset({"unknown", "padding"})
_SENTENCEPIECE_IDS = {"unknown": 0, "bos": 1, "eos": 2}
# Special tokens of Phi-3 swallow the white space behind them, but for these; the file does not say so.
_PHI3_NAMES, _PHI3_KEEPS = ("phi-3", "phi3"), frozenset({"<unk>", "<s>", "<|endoftext|>"})


class TokenType(enum.IntEnum):
    """`tokenizer.ggml.token_type` values."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufVocab:
    tokens: list[str]
    types: list[int]
    metadata: Mapping[str, Any]

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> GgufVocab:
        tokens = _array(metadata, "tokens")
        if not tokens:
            raise ValueError("tokenizer.ggml.tokens is missing or empty; expected a vocabulary; convert again")
        tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
        if len(set(tokens)) != len(tokens):
            raise ValueError("tokenizer.ggml.tokens has duplicates; expected distinct tokens; convert again")
        types = _array(metadata, "token_type") or [TokenType.NORMAL] * len(tokens)
        vocab = cls(tokens=tokens, types=types[: len(tokens)], metadata=metadata)
        vocab.require_length("token_type", types)
        return vocab

    def array(self, key: str) -> list[Any]:
        """The array `tokenizer.ggml.<key>`, empty when absent."""
        return _array(self.metadata, key)

    def get(self, key: str, default: Any = None) -> Any:
        return self.metadata.get(f"tokenizer.ggml.{key}", default)

    def require_length(self, key: str, array: list[Any]) -> None:
        if len(array) < len(self.tokens):
            raise ValueError(
                f"tokenizer.ggml.{key} has {len(array)} entries; expected {len(self.tokens)}, one for each "
                "token; convert the model again"
            )

    def named_id(self, name: str) -> int | None:
        """The id in `tokenizer.ggml.<name>_token_id`; absent, None or what SentencePiece models have there."""
        value = self.get(f"{name}_token_id")
        if value is None:
            default = _SENTENCEPIECE_IDS.get(name) if self.get("model") == "llama" else None
            return default if default is not None and default < len(self.tokens) else None
        if not 0 <= int(value) < len(self.tokens):
            if name in _DISPENSABLE:
                _log.warning("tokenizer.ggml.%s_token_id=%s is outside the vocabulary: ignored", name, value)
                return None
            raise ValueError(
                f"tokenizer.ggml.{name}_token_id={value}; expected an id below {len(self.tokens)}; "
                "convert the model again"
            )
        return int(value)


def add_marked_tokens(backend: tokenizers.Tokenizer, vocab: GgufVocab) -> None:
    """Make control and user-defined tokens atomic; only control tokens are skipped when decoding."""
    from tokenizers import AddedToken

    is_phi3 = any(word in str(vocab.metadata.get("general.name")).lower() for word in _PHI3_NAMES)

    def marked(*kinds: TokenType) -> list[AddedToken]:
        special = TokenType.CONTROL in kinds
        chosen = (token for token, kind in zip(vocab.tokens, vocab.types, strict=True) if kind in kinds)
        return [
            AddedToken(token, normalized=False, special=special, rstrip=is_phi3 and token not in _PHI3_KEEPS)
            for token in chosen
        ]

    backend.add_special_tokens(marked(TokenType.CONTROL, TokenType.UNKNOWN))
    backend.add_tokens(marked(TokenType.USER_DEFINED))


def surround_with_special_tokens(backend: tokenizers.Tokenizer, vocab: GgufVocab, *, add_bos: bool) -> None:
    """Honour `add_bos_token` (default `add_bos`) and `add_eos_token` (default no)."""
    from tokenizers.processors import TemplateProcessing

    wanted = {"bos": vocab.get("add_bos_token", add_bos), "eos": vocab.get("add_eos_token", False)}
    ids = {name: i for name, want in wanted.items() if want and (i := vocab.named_id(name)) is not None}
    if not ids:
        return
    single = [*(["BOS:0"] if "bos" in ids else []), "$A:0", *(["EOS:0"] if "eos" in ids else [])]
    tokens = [{"id": n.upper(), "ids": [i], "tokens": [vocab.tokens[i]]} for n, i in ids.items()]
    backend.post_processor = TemplateProcessing(single=single, special_tokens=tokens)  # pyright: ignore


def _array(metadata: Mapping[str, Any], key: str) -> list[Any]:
    value = metadata.get(f"tokenizer.ggml.{key}")
    if value is None:
        return []
    return value.tolist() if hasattr(value, "tolist") else list(value)
