"""Structured outputs: a JSON schema, regex, choice or grammar -> the tokens that may come next.

Wraps llguidance (Rust; it releases the interpreter lock). Every grammar is bounded in size and in the work one
step may cost; what exceeds the bounds is the request's error, never the batch's. Knows nothing of arrays on
devices or of schedules.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, final

from jaxllm.config.sampling import StructuredOutputs
from jaxllm.constraints.json_schema import prepare

if TYPE_CHECKING:
    from jaxllm.tokenizer import Tokenizer

# Between the parts of a JSON document: a model that may write white space without end sometimes does.
WHITE_SPACE = r"\n[ ]{0,20}|[ ]{1,4}|\t{1,8}"
_LOOK_AROUND = re.compile(r"(?<!\\)(?:\\\\)*(\(\?<?[=!]|\\[bB])")
_INTERNALS = re.compile(r"[<>{}]|::|NoExt|lexer|Lexer|Earley|fuel|max_|rx|forced")


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
            initial_lexer_fuel=500_000,
            step_lexer_fuel=100_000,
            step_max_items=20_000,
            max_lexer_states=20_000,
            max_grammar_size=100_000,
            verbose_errors=False,
        )
        try:
            grammar, ignored = _grammar(spec)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{_kind(spec)} is not usable: {_one_line(error)}") from None
        matcher = LLMatcher(self._token_trie(), grammar, log_level=0, limits=limits)
        if matcher.is_error() and "oneOf" in matcher.get_error():
            grammar, ignored = _grammar(spec, one_of_as_any=True)
            matcher = LLMatcher(self._token_trie(), grammar, log_level=0, limits=limits)
        matcher.compute_bitmask()  # some grammars only fail where they are first used
        if matcher.is_error():
            raise ValueError(f"{_kind(spec)} is not usable: {_explained(matcher.get_error())}")
        return GrammarConstraint(matcher, tuple(f"{keyword} is not enforced" for keyword in ignored))

    def _token_trie(self) -> Any:
        with self._lock:
            if self._trie is None:
                from llguidance import LLTokenizer

                text = self._tokenizer.backend.to_str()
                self._trie = LLTokenizer(text, n_vocab=self._vocab_size, eos_token=self._eos or None)
        return self._trie


@final
class GrammarConstraint:
    """One answer's way through a grammar; see `jaxllm.scheduling.request.Constraint`.

    `warnings` say what of the form that was asked for is not enforced.
    """

    is_fixed = False

    def __init__(self, matcher: Any, warnings: tuple[str, ...] = ()):
        self._matcher = matcher
        self.warnings = warnings
        self.finished = False
        self.error: str | None = None

    def copy(self) -> GrammarConstraint:
        """An independent constraint in the same state."""
        copied = GrammarConstraint(self._matcher.deep_copy(), self.warnings)
        copied.finished, copied.error = self.finished, self.error
        return copied

    def accept(self, token: int) -> None:
        """Take one sampled token."""
        self._matcher.consume_token(token)
        self._check()
        self.finished = self._matcher.is_stopped()

    def forced(self) -> Sequence[int]:
        """The tokens that must come next, as the tokenizer would cut the text that must."""
        return () if self.finished or self.error is not None else self._matcher.compute_ff_tokens()

    def rewind(self, tokens: Sequence[int]) -> None:
        """Go back to where exactly these tokens were accepted."""
        self._matcher.reset()
        self.finished, self.error = False, None
        for token in tokens:
            self.accept(token)

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


def _grammar(spec: StructuredOutputs, *, one_of_as_any: bool = False) -> tuple[str, tuple[str, ...]]:
    """The compiler's grammar, and the keywords of a JSON schema that it does not enforce."""
    from llguidance import LLMatcher

    if spec.json is not None or spec.json_object:
        schema, ignored = prepare({"type": "object"} if spec.json is None else spec.json)
        grammar = LLMatcher.grammar_from_json_schema(
            json.dumps(schema), overrides={"whitespace_pattern": WHITE_SPACE, "coerce_one_of": one_of_as_any}
        )
        return grammar, (*ignored, *(("oneOf",) if one_of_as_any else ()))
    if spec.regex is not None:
        if found := _LOOK_AROUND.search(spec.regex):
            raise ValueError(f"{found.group(1)!r} looks around, which is not supported; write it without")
        return LLMatcher.grammar_from_regex(spec.regex), ()
    if spec.choice is not None:
        return LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(c) for c in spec.choice)), ()
    assert spec.grammar is not None
    return LLMatcher.grammar_from_lark(_as_lark(spec.grammar)), ()


def _as_lark(grammar: str) -> str:
    """The grammar itself, or what its GBNF (llama.cpp's notation, `root ::= ...`) is in Lark."""
    from llguidance.gbnf_to_lark import gbnf_to_lark, is_lark_syntax

    if "::=" not in grammar or is_lark_syntax(grammar):
        return grammar
    try:
        return gbnf_to_lark(grammar)
    except Exception as error:  # the converter raises plain ones
        raise ValueError(f"its GBNF is wrong: {error}") from None


def _explained(error: str) -> str:
    """The compiler's complaint; where that is about its own workings, what it comes down to."""
    text = _one_line(error)
    if "limit" in text or "fuel" in text or "too large" in text or "too many" in text:
        return "it is too complex; simplify it"
    if _INTERNALS.search(text) and "regex" not in text and "unknown name" not in text:
        return "it matches nothing, refers to itself or is too complex; simplify it"
    return text


def _one_line(error: object) -> str:
    return " ".join(str(error).split())[:300]
