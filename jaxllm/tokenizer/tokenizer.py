"""The tokenizer every other part uses.

Inputs: text, token ids or chat messages. Outputs: token ids, text or a prompt. It wraps the `tokenizers`
library and does not know where the vocabulary came from (`hf_folder.py`, `gguf.py` build it).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, final

from jaxllm.tokenizer.chat import Chat
from jaxllm.tokenizer.detokenizer import ByteDetokenizer, IncrementalDetokenizer, WindowDetokenizer
from jaxllm.tokenizer.token_bytes import TokenBytes

if TYPE_CHECKING:
    import tokenizers

    from jaxllm.tokenizer.control_tokens import ControlTokens

_LOG = logging.getLogger(__name__)


@final
class Tokenizer:
    """Text <-> token ids for one model.

    Attributes:
        vocab_size: one more than the largest token id. The model's own (padded) vocabulary may be larger.
        bos_token_id: beginning-of-sequence id, or None.
        eos_token_ids: every id that ends an answer, end-of-turn ids included.
        chat: the model's chat templates.
        special_tokens: names such as `bos_token` to their text, as chat templates see them.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_token_id: int | None,
        eos_token_ids: tuple[int, ...],
        chat_templates: Mapping[str, str],
        special_tokens: Mapping[str, str],
    ) -> None:
        self.backend = backend
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.bos_token_id = bos_token_id
        self.eos_token_ids = eos_token_ids
        self.special_tokens = dict(special_tokens)
        self.chat = Chat(chat_templates, special_tokens)
        self._bytes = TokenBytes(backend)
        added = backend.get_added_tokens_decoder()
        self._special_ids = frozenset(i for i, token in added.items() if token.special)
        self._warned_of_bos = False

    @property
    def chat_template(self) -> str | None:
        """Jinja source of the default template, or None for a model without one."""
        return self.chat.source()

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; special tokens written in the text become their ids.

        `add_special_tokens` adds what the model wants around a text (often BOS). Pass False for the output
        of `apply_chat_template`, which has them already.
        """
        _refuse_lone_surrogates(text)
        ids = self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        if add_special_tokens:
            self._warn_of_double_bos(ids)
        return ids

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
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """The text of the prompt for a conversation; `chat_prompt` gives its token ids too.

        Args:
            messages: `{"role", "content"}` dicts as OpenAI clients send them, content being text or text parts.
            tools: JSON-schema function definitions, or None.
            add_generation_prompt: end where the assistant's answer begins; None: unless the last message continues.
            continue_final_message: end with the last message's text, so that the model continues it.
            **variables: extra template variables: well-known ones (`chat_template.ALLOWED_VARIABLES`) and those
                that the template reads.

        Raises:
            ValueError: bad messages, a variable that is not allowed, a model without a template, a template
                that fails or exceeds its bounds.
        """
        return self.chat.render(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables=variables,
        )

    def chat_prompt(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """A conversation as a prompt: its text and its token ids. Arguments as in `apply_chat_template`.

        Control tokens in the messages stay text, unless `ChatOptions.sanitize_control_tokens` is off.

        Returns:
            `{"prompt": text, "prompt_token_ids": ids}`.
        """
        control = self._control_tokens if self.chat.options.sanitize_control_tokens else None
        text = self.chat.render(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables=chat_template_kwargs,
            control_tokens=control,
        )
        if control is None:
            return {"prompt": text, "prompt_token_ids": self.encode(text, add_special_tokens=False)}
        _refuse_lone_surrogates(text)
        return {"prompt": control.unmarked(text), "prompt_token_ids": control.encode(text)}

    def detokenizer(self, *, skip_special_tokens: bool = True, kept: Collection[str] = ()) -> IncrementalDetokenizer:
        """A fresh stream for one sequence: pushes and `finish()` together give `decode(all ids)`.

        Of the special tokens that are skipped, those written as one of `kept` stay in the text.
        """
        skipped = self._special_ids - {self.backend.token_to_id(text) for text in kept} if skip_special_tokens else ()
        if self._bytes.is_byte_level:
            return ByteDetokenizer(self.token_bytes, skipped)
        decode = functools.partial(self.backend.decode, skip_special_tokens=False)
        known = range(self.vocab_size)
        return WindowDetokenizer(decode, skipped, self._bytes.byte_fallback_ids, known)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for (part of a character for some); empty outside the vocabulary."""
        return self._bytes.get(token_id)

    @functools.cached_property
    def special_token_ids(self) -> Mapping[str, int]:
        """Text of each special token -> its id."""
        return {token.content: i for i, token in self.backend.get_added_tokens_decoder().items() if token.special}

    def token_text(self, token_id: int) -> str:
        """One token as text, for logprobs; special tokens show their name, half characters U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")

    @functools.cached_property
    def _control_tokens(self) -> ControlTokens:
        from jaxllm.tokenizer.control_tokens import ControlTokens

        return ControlTokens(self.backend)

    def _warn_of_double_bos(self, ids: Sequence[int]) -> None:
        if self._warned_of_bos or self.bos_token_id is None or list(ids[:2]) != [self.bos_token_id] * 2:
            return
        self._warned_of_bos = True
        _LOG.warning(
            "a prompt begins with %s, and the tokenizer puts another one before it; leave it out of the text "
            "(said once)",
            self.special_tokens.get("bos_token", "the beginning-of-sequence token"),
        )


def _refuse_lone_surrogates(text: str) -> None:
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text has the lone surrogate U+{ord(text[error.start]):04X} at {error.start}; "
            "expected Unicode text; remove it"
        ) from None
