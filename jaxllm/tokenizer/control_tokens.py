"""Control tokens that a user typed stay text; those that the chat template writes are tokens.

`<|im_end|>` in a question, or in what a tool returned, would end the turn for the model: whoever writes into a
conversation could speak as somebody else. So the texts that go into a template carry marks around such words, and the
prompt is encoded by a copy of the tokenizer whose control tokens are spelled with a mark before them: only those that
the template wrote are respelled so. Everything else, the borders between tokens included, is as without marks.

Only tokens that the tokenizer calls special count: `<think>` or `<tool_call>`, which belong to ordinary vocabulary in
most models, may be quoted in a history and stay tokens.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, final

if TYPE_CHECKING:
    import tokenizers

# Noncharacters of Unicode: never in a text that is exchanged, and no tokenizer knows them.
START, END = "\ufdd0", "\ufdd1"
_MARKS = re.compile(f"[{START}{END}]")


@final
class ControlTokens:
    """The control tokens of one tokenizer."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        added = backend.get_added_tokens_decoder().values()
        self._backend = backend
        self._words = {token.content for token in added if token.special and token.content.strip()}
        words = _any_of(sorted(self._words)) or r"(?!)"
        self._word = re.compile(words)
        self._marked = re.compile(f"{START}({words}){END}|({words})|[{START}{END}]")

    def mark(self, value: Any) -> Any:
        """A copy of a JSON value with marks around every control token in its texts and keys."""
        if isinstance(value, str):
            return self._word.sub(f"{START}\\g<0>{END}", _MARKS.sub("\ufffd", value))
        if isinstance(value, dict):
            return {self.mark(key): self.mark(item) for key, item in value.items()}
        return [self.mark(item) for item in value] if isinstance(value, list) else value

    def unmarked(self, prompt: str) -> str:
        """The prompt as people read it."""
        return _MARKS.sub("", prompt)

    def encode(self, prompt: str) -> list[int]:
        """Token ids of a prompt whose users' texts were marked."""
        if not _MARKS.search(prompt):
            return self._backend.encode(prompt, add_special_tokens=False).ids
        respelled = self._marked.sub(_respelled, prompt)
        return self._copy.encode(respelled, add_special_tokens=False).ids

    @functools.cached_property
    def _copy(self) -> tokenizers.Tokenizer:
        """The tokenizer with `START` before the text of each control token. Made when one is first typed."""
        from tokenizers import Tokenizer

        content = json.loads(self._backend.to_str())
        for token in content["added_tokens"]:
            if token["content"] in self._words:
                token["content"] = START + token["content"]
        model = content["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {self._spelled(text): i for text, i in model["vocab"].items()}
        else:
            model["vocab"] = [[self._spelled(text), *rest] for text, *rest in model["vocab"]]
        if isinstance(model.get("unk_token"), str):
            model["unk_token"] = self._spelled(model["unk_token"])
        content["post_processor"] = None  # what is put around a text is not wanted here
        return Tokenizer.from_str(json.dumps(content))

    def _spelled(self, text: str) -> str:
        return START + text if text in self._words else text


def _any_of(words: Sequence[str]) -> str:
    """A pattern for the longest of sorted words, by common beginnings: 250 words cost no more than one."""
    rest = [word for word in words if word]
    if not rest:
        return ""
    branches = [
        re.escape(first) + _any_of([word[1:] for word in group])
        for first, group in itertools.groupby(rest, key=lambda word: word[0])
    ]
    pattern = branches[0] if len(branches) == 1 and len(rest) == len(words) else f"(?:{'|'.join(branches)})"
    return pattern if len(rest) == len(words) else f"{pattern}?"  # one of the words ends here


def _respelled(match: re.Match[str]) -> str:
    typed, written = match.groups()
    return typed or (START + written if written else "")
