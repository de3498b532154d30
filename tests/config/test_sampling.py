"""Every field of SamplingParams refuses what it cannot mean, naming the field and the value."""

from __future__ import annotations

import math
import re

import pytest

from jaxllm import SamplingParams

NOT_FINITE = [math.nan, math.inf, -math.inf]
NO_NUMBER = ["1", None, True, [1.0], 1j]
FLOATS = {
    "temperature": [-0.01, 101.0],
    "top_p": [0.0, -0.5, 1.01],
    "min_p": [-0.1, 1.1],
    "presence_penalty": [-2.1, 2.1],
    "frequency_penalty": [-2.1, 2.1],
    "repetition_penalty": [0.0, -1.0, 101.0],
}
INTEGERS = {
    "n": [0, -1, 129],
    "top_k": [-2, 2**31],
    "max_tokens": [0, -1, 2**31],
    "min_tokens": [-1, 2**31],
    "seed": [-(2**63) - 1, 2**64],
    "logprobs": [-1, 21],
}
BAD = [
    *((name, value) for name, values in FLOATS.items() for value in [*values, *NOT_FINITE, *NO_NUMBER]),
    *((name, value) for name, values in INTEGERS.items() for value in [*values, *NOT_FINITE, 1.5, 1.0, "1", True]),
    ("stop", [""]),
    ("stop", ["a", 3]),
    ("stop", b"end"),
    ("stop", ["x"] * 17),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", [1.0]),
    ("stop_token_ids", ["a"]),
    ("stop_token_ids", list(range(17))),
]
GOOD = [
    ("temperature", [0, 0.0, 1, 0.7, 100.0]),
    ("top_p", [1e-9, 0.5, 1, 1.0]),
    ("min_p", [0, 0.5, 1.0]),
    ("presence_penalty", [-2.0, 0, 2]),
    ("frequency_penalty", [-2.0, 0, 2]),
    ("repetition_penalty", [0.01, 1, 1.3, 100]),
    ("n", [1, 128]),
    ("top_k", [-1, 0, 1, 2**31 - 1]),
    ("max_tokens", [None, 1, 2**31 - 1]),
    ("min_tokens", [0, 16]),
    ("seed", [None, 0, -1, 2**64 - 1]),
    ("logprobs", [None, 0, 20]),
    ("stop_token_ids", [(0,), tuple(range(16))]),
    ("logit_bias", [None, {0: -100.0, 5: 100, 7: 0.5}, dict.fromkeys(range(300), 1.0)]),
    ("ignore_eos", [True, False]),
    ("detokenize", [True, False]),
    ("skip_special_tokens", [True, False]),
    ("include_stop_str_in_output", [True, False]),
]


@pytest.mark.parametrize(("name", "value"), BAD, ids=lambda v: str(v)[:30])
def test_bad_value_is_refused_by_field_and_value(name, value):
    with pytest.raises(ValueError, match=f"^{name}={re.escape(repr(value))}; it must be .+") as error:
        SamplingParams(**{name: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        ({-1: 1.0}, r"logit_bias has key -1;"),
        ({"5": 1.0}, r"logit_bias has key '5';"),
        ({1.0: 1.0}, r"logit_bias has key 1\.0;"),
        ({5: 100.5}, r"logit_bias\[5\]=100\.5; it must be between -100 and 100"),
        ({5: math.nan}, r"logit_bias\[5\]=nan; it must be a finite number"),
        ({5: -math.inf}, r"logit_bias\[5\]=-inf; it must be a finite number"),
        ({5: True}, r"logit_bias\[5\]=True;"),
        (dict.fromkeys(range(301), 1.0), r"logit_bias has 301 entries; at most 300"),
    ],
    ids=str,
)
def test_bad_logit_bias_is_refused_by_key_and_value(bias, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(logit_bias=bias)


@pytest.mark.parametrize(("name", "values"), GOOD)
def test_good_values_are_kept(name, values):
    for value in values:
        assert getattr(SamplingParams(**{name: value}), name) == value


def test_stop_may_be_one_string_or_several():
    assert SamplingParams(stop="end").stop == ("end",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert SamplingParams().stop == ()


def test_unknown_field_is_refused_by_name():
    with pytest.raises(TypeError, match="best_of"):
        SamplingParams(best_of=2)


def test_params_cannot_be_changed_after_they_were_checked():
    with pytest.raises(AttributeError):
        SamplingParams().temperature = math.nan


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0.5},
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.1},
        {"frequency_penalty": 0.1},
        {"logit_bias": {1: 1.0}},
        {"logprobs": 0},
        {"min_tokens": 1},
    ],
    ids=str,
)
def test_only_a_request_that_asks_for_nothing_else_is_plainly_greedy(changes):
    assert SamplingParams(temperature=0.0).plain_greedy
    assert not SamplingParams(**({"temperature": 0.0} | changes)).plain_greedy


WRONG_TYPES = [
    ("n", None),
    ("top_k", None),
    ("min_tokens", None),
    ("temperature", 10**400),
    ("max_tokens", 10**400),
    ("stop", 5),
    ("stop_token_ids", 5),
    ("stop_token_ids", [True]),
    ("logit_bias", [1]),
    ("logit_bias", {True: 1.0}),
    ("ignore_eos", "no"),
    ("ignore_eos", None),
    ("detokenize", 1),
    ("skip_special_tokens", "false"),
    ("include_stop_str_in_output", 0),
]


@pytest.mark.parametrize(("name", "value"), WRONG_TYPES, ids=lambda v: str(v)[:30])
def test_value_of_a_wrong_type_is_refused_by_field(name, value):
    with pytest.raises(ValueError, match=name):
        SamplingParams(**{name: value})


def test_minimum_above_the_maximum_is_refused():
    with pytest.raises(ValueError, match=r"min_tokens=5.*max_tokens=4"):
        SamplingParams(min_tokens=5, max_tokens=4)
