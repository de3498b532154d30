"""SentencePiece BPE from GGUF (`tokenizer.ggml.model = "llama"`: Llama 2, Mistral, Gemma).

Inputs: a `GgufVocab` with scores. Output: a `tokenizers.Tokenizer`. Such files hold no merges: SentencePiece
joins the two neighbours whose joint piece has the best score, so every way of cutting a piece in two known
pieces becomes a merge, ranked by the score of the piece.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxllm.tokenizer.gguf_vocab import (
    GgufVocab,
    TokenType,
    add_marked_tokens,
    surround_with_special_tokens,
)

if TYPE_CHECKING:
    import tokenizers
    from tokenizers.decoders import Decoder
    from tokenizers.normalizers import Normalizer

_SPACE = "\u2581"


def sentencepiece_backend(vocab: GgufVocab) -> tokenizers.Tokenizer:
    """Raises ValueError when scores are missing or do not match the tokens."""
    from tokenizers import Tokenizer, models

    scores = vocab.array("scores")
    vocab.require_length("scores", scores)
    ids = {token: i for i, token in enumerate(vocab.tokens)}
    unknown = vocab.named_id("unknown")
    bpe = models.BPE(
        ids,
        merges_from_scores(vocab, ids, scores),
        unk_token=None if unknown is None else vocab.tokens[unknown],
        byte_fallback=True,
        fuse_unk=True,
    )
    backend = Tokenizer(bpe)
    add_prefix = bool(vocab.get("add_space_prefix", True))
    backend.normalizer = _normalizer(add_prefix)  # pyright: ignore
    backend.decoder = _decoder(add_prefix)  # pyright: ignore
    add_marked_tokens(backend, vocab)
    surround_with_special_tokens(backend, vocab, add_bos=True)
    return backend


def merges_from_scores(vocab: GgufVocab, ids: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Merges, best first. Ties go to the piece, then the left part, that has the lower id."""
    # Control, byte and user-defined pieces never result from joining.
    joinable = {token: i for token, i in ids.items() if vocab.types[i] == TokenType.NORMAL}
    ranked = []
    for piece, i in joinable.items():
        for cut in range(1, len(piece)):
            left, right = joinable.get(piece[:cut]), joinable.get(piece[cut:])
            if left is not None and right is not None:
                ranked.append((-scores[i], i, left, right))
    ranked.sort()
    return [(vocab.tokens[left], vocab.tokens[right]) for _, _, left, right in ranked]


def _normalizer(add_prefix: bool) -> Normalizer:
    from tokenizers import normalizers

    replace = normalizers.Replace(" ", _SPACE)
    return normalizers.Sequence([normalizers.Prepend(_SPACE), replace]) if add_prefix else replace


def _decoder(add_prefix: bool) -> Decoder:
    from tokenizers import decoders

    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if add_prefix else steps)
