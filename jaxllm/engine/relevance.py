"""Texts judged rather than continued: classes of a classifier, and how well a document answers a query.

A query and a document -> one score between 0 and 1: a classifier of one label says it by its head, any other model by
how much likelier "yes" is than "no" when it is asked (Qwen3-Reranker's way, Zhang et al. 2025). Each text is a
`ScoringPass`; whoever steps the engine runs it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxllm.engine.scoring import ScoringPass

if TYPE_CHECKING:
    from jaxllm.engine.completions import Jobs
    from jaxllm.scheduling.adapter_slots import Adapter

INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
_SYSTEM = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. Note that the "
    'answer can only be "yes" or "no".'
)


@dataclass(frozen=True, slots=True)
class ClassificationOutput:
    """Attributes: `probs` of the labels, or their logits where no activation was wanted; `label` of the likeliest."""

    probs: list[float]
    label: str

    @property
    def num_classes(self) -> int:
        """How many labels there are."""
        return len(self.probs)


@dataclass(frozen=True, slots=True)
class ClassificationRequestOutput:
    """One text's classes."""

    prompt_token_ids: list[int]
    outputs: ClassificationOutput
    request_id: str = ""
    finished: bool = True


@dataclass(frozen=True, slots=True)
class ScoringOutput:
    """Attributes: `score`, between 0 and 1."""

    score: float


@dataclass(frozen=True, slots=True)
class ScoringRequestOutput:
    """One pair's score."""

    prompt_token_ids: list[int]
    outputs: ScoringOutput
    request_id: str = ""
    finished: bool = field(default=True)


class Judge:
    """Makes the passes of one engine's texts, and reads them. `jobs.classifier` is the model's head, if it has one."""

    def __init__(self, jobs: Jobs):
        self._jobs, self._head = jobs, jobs.classifier

    def classify(self, prompt: Any, adapter: Adapter | None = None) -> ScoringPass:
        """The pass of a text. Raises ValueError where the model is no classifier, or the text does not fit."""
        if self._head is None:
            raise ValueError("the model is no classifier: its architecture is not ...ForSequenceClassification")
        return ScoringPass(self._jobs.scorer, self._jobs.scorer.check(self._jobs.token_ids(prompt)), "last", adapter)

    def classes(self, work: ScoringPass, *, use_activation: bool = True) -> ClassificationRequestOutput:
        """What a finished pass of `classify` says."""
        assert self._head is not None and work.vector is not None
        logits = self._head.logits(work.vector)
        numbers = self._head.probs(logits) if use_activation else logits
        label = self._head.labels[int(np.argmax(logits))] if len(logits) > 1 else self._head.labels[0]
        return ClassificationRequestOutput(work.token_ids, ClassificationOutput(numbers.tolist(), label))

    def pair(
        self, query: str, document: str, instruction: str | None = None, adapter: Adapter | None = None
    ) -> ScoringPass:
        """The pass of a query and a document. Raises ValueError where the model has no score of a pair."""
        for text in (query, document):
            if not isinstance(text, str) or not text:
                raise ValueError(f"a query and its documents are texts, not {str(text)[:40]!r}")
        scorer, tokenizer = self._jobs.scorer, self._jobs.tokenizer
        if self._head is None:
            ids, choices = self._question(query, document, instruction or INSTRUCTION), self._answers()
            return ScoringPass(scorer, scorer.check(ids), None, adapter, choices=choices)
        if len(self._head.labels) != 1:
            raise ValueError(f"the classifier has {len(self._head.labels)} labels; scores need one: use classify")
        ids = tokenizer.encode(query) + tokenizer.encode(document, add_special_tokens=False)
        return ScoringPass(scorer, scorer.check(ids), "last", adapter)

    def score(self, work: ScoringPass) -> ScoringRequestOutput:
        """What a finished pass of `pair` says."""
        if self._head is None:
            yes, no = work.chosen
            value = 1.0 / (1.0 + math.exp(min(no - yes, 700.0)))
        else:
            assert work.vector is not None
            value = float(self._head.probs(self._head.logits(work.vector))[0])
        return ScoringRequestOutput(work.token_ids, ScoringOutput(value))

    def _question(self, query: str, document: str, instruction: str) -> list[int]:
        tokenizer = self._jobs.tokenizer
        asked = f"<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}"
        if not tokenizer.chat_template:
            return tokenizer.encode(f"{_SYSTEM}\n{asked}\nAnswer:")
        messages = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": asked}]
        return tokenizer.chat_prompt(messages, chat_template_kwargs={"enable_thinking": False})["prompt_token_ids"]

    def _answers(self) -> tuple[int, int]:
        """The tokens of yes and no."""
        yes, no = (self._jobs.tokenizer.encode(word, add_special_tokens=False) for word in ("yes", "no"))
        if not yes or not no or yes[0] == no[0]:
            raise ValueError("the tokenizer cannot tell yes from no by their first tokens; use a reranker's model")
        return yes[0], no[0]


def text_pairs(queries: Any, texts: Any) -> list[tuple[str, str]]:
    """One query with every text, or queries and texts one by one. Raises ValueError where their numbers differ."""
    first = [queries] if isinstance(queries, str) else list(queries)
    second = [texts] if isinstance(texts, str) else list(texts)
    if not first or not second:
        raise ValueError("there is no pair to score; give at least one query and one text")
    if len(first) == 1:
        first *= len(second)
    if len(first) != len(second):
        raise ValueError(f"{len(first)} queries for {len(second)} texts; give one, or one for each")
    return list(zip(first, second, strict=True))
