"""The tokenizer every other part uses.

Inputs: text, token ids or chat messages. Outputs: token ids, text or a prompt. It wraps the `tokenizers`
library and does not know where the vocabulary came from (`hf_folder.py`, `gguf.py` build it).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, final

from jaxllm.tokenizer.detokenizer import ByteDetokenizer, IncrementalDetokenizer, WindowDetokenizer
from jaxllm.tokenizer.token_bytes import TokenBytes

if TYPE_CHECKING:
    import tokenizers

    from jaxllm.tokenizer.chat_template import ChatTemplate


@final
class Tokenizer:
    """Text <-> token ids for one model.

    Attributes:
        vocab_size: one more than the largest token id. The model's own (padded) vocabulary may be larger.
        bos_token_id: beginning-of-sequence id, or None.
        eos_token_ids: every id that ends an answer, end-of-turn ids included.
        chat_template: Jinja source, or None for a model without one.
        special_tokens: names such as `bos_token` to their text, as chat templates see them.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_token_id: int | None,
        eos_token_ids: tuple[int, ...],
        chat_template: str | None,
        special_tokens: Mapping[str, str],
    ) -> None:
        self.backend = backend
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.bos_token_id = bos_token_id
        self.eos_token_ids = eos_token_ids
        self.chat_template = chat_template
        self.special_tokens = dict(special_tokens)
        self._bytes = TokenBytes(backend)
        added = backend.get_added_tokens_decoder()
        self._special_ids = frozenset(i for i, token in added.items() if token.special)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; special tokens written in the text become their ids.

        `add_special_tokens` adds what the model wants around a text (often BOS). Pass False for the output
        of `apply_chat_template`, which has them already.
        """
        if not text.isascii():
            _refuse_lone_surrogates(text)
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `ids`. Bytes that are not UTF-8 become U+FFFD; ids outside the vocabulary give no text."""
        ids = list(ids)
        if ids and min(ids) < 0:
            raise ValueError(f"got token id {min(ids)}; expected ids >= 0")
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def apply_chat_template(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The prompt for a conversation; encode it with `add_special_tokens=False`.

        Args:
            messages: `{"role", "content"}` dicts, content being text or a list of text parts.
            tools: JSON-schema function definitions, or None.
            add_generation_prompt: end where the assistant's answer begins.
            **variables: extra template variables, only names in `chat_template.ALLOWED_VARIABLES`.

        Raises:
            ValueError: bad messages, a variable that is not allowed, a model without a template, a template
                that fails or exceeds its bounds.
        """
        return self._compiled_template.render(
            messages, tools=tools, add_generation_prompt=add_generation_prompt, variables=variables
        )

    def chat_prompt(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """A conversation as a prompt: its text and its token ids. Arguments as in `apply_chat_template`.

        Returns:
            `{"prompt": text, "prompt_token_ids": ids}`.
        """
        text = self._compiled_template.render(
            messages, tools=tools, add_generation_prompt=add_generation_prompt, variables=chat_template_kwargs
        )
        return {"prompt": text, "prompt_token_ids": self.encode(text, add_special_tokens=False)}

    def detokenizer(self, *, skip_special_tokens: bool = True) -> IncrementalDetokenizer:
        """A fresh stream for one sequence: pushes and `finish()` together give `decode(all ids)`."""
        skipped = self._special_ids if skip_special_tokens else frozenset()
        if self._bytes.is_byte_level:
            return ByteDetokenizer(self.token_bytes, skipped)
        decode = functools.partial(self.backend.decode, skip_special_tokens=False)
        known = range(self.vocab_size)
        return WindowDetokenizer(decode, skipped, self._bytes.byte_fallback_ids, known)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for (part of a character for some); empty outside the vocabulary."""
        return self._bytes.get(token_id)

    def token_text(self, token_id: int) -> str:
        """One token as text, for logprobs; special tokens show their name, half characters U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")

    @functools.cached_property
    def _compiled_template(self) -> ChatTemplate:
        if self.chat_template is None:
            raise ValueError("this model has no chat template; use generate")
        from jaxllm.tokenizer.chat_template import ChatTemplate

        return ChatTemplate(self.chat_template, self.special_tokens)


def _refuse_lone_surrogates(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text has the lone surrogate U+{ord(text[error.start]):04X} at {error.start}; "
            "expected Unicode text; remove it"
        ) from None
