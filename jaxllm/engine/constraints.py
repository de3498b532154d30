"""Structured outputs: a JSON schema, regex, choice or grammar -> the tokens that may come next.

Wraps llguidance (Rust; it releases the interpreter lock). Every grammar is bounded in size and in the work one
step may cost; what exceeds the bounds is the request's error, never the batch's. Knows nothing of arrays on
devices or of schedules.
"""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING, Any, final

from jaxllm.config.sampling import StructuredOutputs

if TYPE_CHECKING:
    from jaxllm.tokenizer import Tokenizer


@final
class GrammarCompiler:
    """Compiles grammars for one tokenizer. Thread-safe; the token trie is built on first use (about a second)."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: tuple[int, ...]):
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos = list(eos_token_ids)
        self._lock = threading.Lock()
        self._trie: Any = None

    def compile(self, spec: StructuredOutputs) -> GrammarConstraint:
        """A fresh constraint. Raises ValueError, one line, for a grammar that is wrong or too complex."""
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(
            initial_lexer_fuel=500_000, step_lexer_fuel=100_000, step_max_items=20_000, max_lexer_states=20_000,
            max_grammar_size=100_000, verbose_errors=False,
        )  # fmt: skip
        try:
            grammar = _grammar(spec)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{_kind(spec)} is not usable: {_one_line(error)}") from None
        matcher = LLMatcher(self._token_trie(), grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise ValueError(f"{_kind(spec)} is not usable: {_one_line(matcher.get_error())}")
        return GrammarConstraint(matcher)

    def _token_trie(self) -> Any:
        with self._lock:
            if self._trie is None:
                from llguidance import LLTokenizer

                text = self._tokenizer.backend.to_str()
                self._trie = LLTokenizer(text, n_vocab=self._vocab_size, eos_token=self._eos or None)
        return self._trie


@final
class GrammarConstraint:
    """One answer's way through a grammar; see `jaxllm.scheduling.request.Constraint`."""

    def __init__(self, matcher: Any):
        self._matcher = matcher
        self.finished = False
        self.error: str | None = None

    def copy(self) -> GrammarConstraint:
        """An independent constraint in the same state."""
        return GrammarConstraint(self._matcher.deep_copy())

    def accept(self, token: int) -> None:
        """Take one sampled token."""
        self._matcher.consume_token(token)
        self._check()
        self.finished = self._matcher.is_stopped()

    def fill_mask(self, words: Any) -> None:
        """Write the allowed tokens as bits into int32 `words`; all of them once the grammar has failed."""
        from llguidance.numpy import fill_next_token_bitmask

        fill_next_token_bitmask(self._matcher, words[None])
        self._check()
        if self.error is not None:
            words[:] = -1

    def _check(self) -> None:
        if self._matcher.is_error():
            self.error = f"the grammar cannot go on: {_one_line(self._matcher.get_error())}"


def _kind(spec: StructuredOutputs) -> str:
    """What the user gave: the same constraint comes from response_format, tools and structured_outputs."""
    if spec.json is not None or spec.json_object:
        return "the JSON schema"
    return "the regex" if spec.regex is not None else "the choice" if spec.choice is not None else "the grammar"


def _grammar(spec: StructuredOutputs) -> str:
    from llguidance import LLMatcher

    if spec.json is not None:
        return LLMatcher.grammar_from_json_schema(spec.json)
    if spec.json_object:
        return LLMatcher.grammar_from_json_schema({"type": "object"})
    if spec.regex is not None:
        return LLMatcher.grammar_from_regex(spec.regex)
    if spec.choice is not None:
        return LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(c) for c in spec.choice))
    assert spec.grammar is not None
    return LLMatcher.grammar_from_lark(spec.grammar)


def _one_line(error: object) -> str:
    return " ".join(str(error).split())[:300]
