"""Which bytes a token stands for.

Inputs: a `tokenizers.Tokenizer` and a token id. Output: bytes. It does not know about special tokens being
skipped or about sequences; what depends on neighbours (such as a stripped first space) is not here.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tokenizers


class TokenBytes:
    """Lazily filled table from token id to bytes."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        kinds = _decoder_kinds(backend)
        self.is_byte_level = kinds == ["ByteLevel"]
        self._backend = backend
        self._is_sentencepiece = "ByteFallback" in kinds or "Metaspace" in kinds
        self._cache: dict[int, bytes] = {}
        found = (backend.token_to_id(f"<0x{b:02X}>") for b in range(256)) if "ByteFallback" in kinds else ()
        self.byte_fallback_ids = frozenset(i for i in found if i is not None)

    def get(self, token_id: int) -> bytes:
        if token_id not in self._cache:
            token = self._backend.id_to_token(token_id) if token_id >= 0 else None
            if token is None:
                return b""  # not cached: the ids of a padded vocabulary must not grow the table
            self._cache[token_id] = self._convert(token_id, token)
        return self._cache[token_id]

    def _convert(self, token_id: int, token: str) -> bytes:
        if self.is_byte_level:
            return byte_level_bytes(token)
        if token_id in self.byte_fallback_ids:
            return bytes.fromhex(token[3:5])
        if self._is_sentencepiece:
            return token.replace("\u2581", " ").encode()
        return self._backend.decode([token_id], skip_special_tokens=False).encode()


def byte_to_unicode() -> dict[int, str]:
    """GPT-2's printable alphabet: visible Latin-1 stands for itself, the rest starts at U+0100."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in visible]
    return {b: chr(b) for b in visible} | {b: chr(0x100 + n) for n, b in enumerate(hidden)}


_UNICODE_TO_BYTE = {char: byte for byte, char in byte_to_unicode().items()}


def byte_level_bytes(token: str) -> bytes:
    """Bytes of a byte-level token; one with a character outside the alphabet (an added token) is literal."""
    try:
        return bytes(_UNICODE_TO_BYTE[char] for char in token)
    except KeyError:
        return token.encode()


def _decoder_kinds(backend: tokenizers.Tokenizer) -> list[str]:
    if backend.decoder is None:
        return []
    state: Any = json.loads(backend.decoder.__getstate__())
    steps = state["decoders"] if state["type"] == "Sequence" else [state]
    return [step["type"] for step in steps]
