"""Added tokens that tokenizer.json lacks, or has with other properties.

Inputs: a backend, the settings of tokenizer_config.json and the object of added_tokens.json. What they say of a token
holds, as in transformers: its text is never split, and it has the id that they name.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tokenizers

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_MAX_GAP = 1 << 16  # ids that no file names, between the vocabulary and an added token
_LOG = logging.getLogger(__name__)


def add_outside_tokens(
    backend: tokenizers.Tokenizer,
    settings: Mapping[str, Any],
    legacy: Mapping[str, Any],
    special_texts: Iterable[str],
) -> None:
    """Add them to `backend`.

    Args:
        backend: changed in place.
        settings: of tokenizer_config.json; `added_tokens_decoder` is read.
        legacy: added_tokens.json, text to id.
        special_texts: tokens with a name (`bos_token` and so on) or a place among the additional special ones.

    Raises:
        ValueError: an id far outside the vocabulary.
    """
    special = set(special_texts)
    wanted = _wanted(settings.get("added_tokens_decoder"), legacy, special)
    known = {repr(token) for token in backend.get_added_tokens_decoder().values()}
    new = {token_id: token for token_id, token in sorted(wanted.items()) if repr(token) not in known}
    # At once: the library indexes all added tokens anew with every call.
    backend.add_tokens(_in_order(backend, new))
    _mark_special(backend, special)


def _wanted(decoder: Any, legacy: Mapping[str, Any], special: set[str]) -> dict[int, tokenizers.AddedToken]:
    from tokenizers import AddedToken

    wanted: dict[int, AddedToken] = {}
    for text, token_id in legacy.items():
        if _is_id(token_id) and text:
            wanted[token_id] = AddedToken(text, normalized=text not in special, special=text in special)
    for key, entry in (decoder if isinstance(decoder, dict) else {}).items():
        if not (key.isdecimal() and isinstance(entry, dict) and isinstance(entry.get("content"), str)):
            raise ValueError(
                f"added_tokens_decoder of tokenizer_config.json has an entry {key[:50]!r} that is no token; "
                "expected an id and an object with content; download it again"
            )
        flags = {name: bool(entry[name]) for name in _FLAGS if name in entry}
        flags["special"] = flags.get("special", False) or entry["content"] in special
        if entry["content"]:
            wanted[int(key)] = AddedToken(entry["content"], **flags)
    return wanted


def _in_order(backend: tokenizers.Tokenizer, new: Mapping[int, tokenizers.AddedToken]) -> list[tokenizers.AddedToken]:
    """The tokens as they must be added, for the library numbers them itself: on from its largest id."""
    from tokenizers import AddedToken

    vocab = backend.get_vocab(with_added_tokens=True)
    following, tokens = max(vocab.values(), default=-1) + 1, []
    for token_id, token in new.items():
        if token.content in vocab:
            tokens.append(token)
        elif token_id < following:
            _LOG.warning("added token %r has the id %d of another token; it is left out", token.content, token_id)
        elif token_id - following > _MAX_GAP:
            raise ValueError(
                f"added token {token.content[:50]!r} has id {token_id}, but the vocabulary ends at {following - 1}; "
                "check added_tokens_decoder of tokenizer_config.json"
            )
        else:
            # What nobody named takes the ids between. Nobody can type a noncharacter.
            gap = range(following, token_id)
            tokens += [AddedToken(f"\ufdd3{i}", normalized=False, special=True) for i in gap]
            tokens.append(token)
            following = token_id + 1
    return tokens


def _mark_special(backend: tokenizers.Tokenizer, special: set[str]) -> None:
    """Special tokens that are only in the vocabulary must not be split either."""
    from tokenizers import AddedToken

    marked = {token.content for token in backend.get_added_tokens_decoder().values()}
    missing = [text for text in sorted(special - marked) if text and backend.token_to_id(text) is not None]
    backend.add_tokens([AddedToken(text, normalized=False, special=True) for text in missing])


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
