"""Token texts that end an answer in the published chat models.

A file that does not list its end-of-turn ids (most GGUF files name one `eos` only) still has to stop there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

END_TOKENS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<|end_of_turn|>",
    "<end_of_turn>",
    "<|eot|>",
)


def with_named_end_tokens(ids: Iterable[int], special_id: Callable[[str], int | None]) -> tuple[int, ...]:
    """`ids`, then the ids of the end tokens that `special_id` knows, each once."""
    named = (special_id(text) for text in END_TOKENS)
    return tuple(dict.fromkeys([*ids, *(i for i in named if i is not None)]))
