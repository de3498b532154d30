"""Tokens that may not come, as masks: alone, after others, beside a grammar."""

from __future__ import annotations

import numpy as np
import pytest

from jaxllm.constraints.token_rules import all_of, token_rules

VOCAB = 70


def allowed(rules) -> set[int]:
    words = np.zeros(-(-VOCAB // 32), np.int32)
    rules.fill_mask(words)
    return {t for t in range(VOCAB) if words[t // 32] >> (t % 32) & 1}


def test_only_the_listed_tokens_and_none_of_the_banned():
    rules = token_rules(VOCAB, allowed=[0, 31, 32, 63, 69], banned=[[31]])
    assert rules is not None and rules.is_fixed
    assert allowed(rules) == {0, 32, 63, 69}
    assert allowed(token_rules(VOCAB, banned=[[31], [64]])) == set(range(VOCAB)) - {31, 64}
    assert token_rules(VOCAB) is None
    with pytest.raises(ValueError, match="leave no token"):
        token_rules(VOCAB, allowed=[3], banned=[[3]])


def test_a_sequence_is_cut_off_before_its_last_token():
    rules = token_rules(VOCAB, banned=[[1, 2, 3], [2, 9]])
    assert rules is not None and not rules.is_fixed
    assert allowed(rules) == set(range(VOCAB))
    rules.accept(1)
    rules.accept(2)
    fork = rules.copy()
    assert allowed(rules) == set(range(VOCAB)) - {3, 9}
    fork.accept(5)
    assert allowed(fork) == set(range(VOCAB)) and 3 not in allowed(rules)


def test_several_constraints_hold_at_once_but_never_forbid_everything():
    first, second = token_rules(VOCAB, allowed=[1, 2, 3]), token_rules(VOCAB, banned=[[2], [7, 3]])
    both = all_of([first, None, second])
    assert both is not None and allowed(both) == {1, 3}
    both.accept(7)
    assert allowed(both) == {1}
    assert allowed(all_of([token_rules(VOCAB, allowed=[2]), second])) == {2}
