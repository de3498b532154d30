"""A completion's text, stop strings, logprobs and end, token by token."""

from __future__ import annotations

import functools
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.config.sampling import SamplingParams
from jaxllm.engine.outputs import CompletionBuilder, Logprob, as_of
from jaxllm.scheduling.request import Ending
from jaxllm.tokenizer import Tokenizer, load_tokenizer
from tests.helpers.byte_tokenizer import EOS, EOS_ID, write_byte_tokenizer

TEXTS = st.text("abcé😀", max_size=24)
STOPS = st.lists(st.text("abcé😀", min_size=1, max_size=4), max_size=4)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_byte_tokenizer(tmp_path_factory.mktemp("bytes")))


def builder_for(tokenizer: Tokenizer, **params) -> CompletionBuilder:
    params = SamplingParams(**params)
    make = functools.partial(tokenizer.detokenizer, skip_special_tokens=params.skip_special_tokens)
    return CompletionBuilder(0, params, make, tokenizer.token_text)


def words(*pieces: str) -> tuple[list[int], SimpleNamespace]:
    """A vocabulary of whole pieces: token `i` is `pieces[i]`."""
    return list(range(len(pieces))), lambda: SimpleNamespace(
        push=lambda ids: "".join(pieces[i] for i in ids), finish=str
    )


def first_stop(text: str, stops: list[str]) -> tuple[int, str] | None:
    """Where the stop string begins that is complete first when characters arrive one by one; the longest of several."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return end - len(stop), stop
    return None


@settings(max_examples=400, deadline=None)
@given(text=TEXTS, stops=STOPS, include=st.booleans(), sizes=st.lists(st.integers(1, 5), max_size=60))
def test_text_ends_at_the_first_stop_string_however_tokens_arrive(tokenizer, text, stops, include, sizes):
    builder = builder_for(tokenizer, stop=stops, include_stop_str_in_output=include)
    ids, stopped = tokenizer.encode(text), None
    while ids and stopped is None:
        size = sizes.pop() if sizes else 1
        stopped = builder.append(ids[:size], None).stop_reason
        ids = ids[size:]
    builder.finish(Ending("length", None))
    output = builder.output
    if (expected := first_stop(text, stops)) is None:
        assert (output.text, output.finish_reason, output.stop_reason) == (text, "length", None)
        return
    at, stop = expected
    assert stopped == output.stop_reason == stop
    assert output.text == text[: at + len(stop) if include else at]
    assert output.finish_reason == "stop"
    assert tokenizer.decode(output.token_ids) == text[: at + len(stop)]


@settings(max_examples=400, deadline=None)
@given(
    ids=st.lists(st.sampled_from([*b"abc", 0xC3, 0xA9, 0xFF, EOS_ID]), max_size=30), stops=STOPS, include=st.booleans()
)
def test_stable_text_only_ever_grows_into_the_final_text(tokenizer, ids, stops, include):
    builder, seen = builder_for(tokenizer, stop=stops, include_stop_str_in_output=include), [""]
    for token in ids:
        stopped = builder.append([token], None).stop_reason
        seen.append(builder.output.text)
        if stopped is not None:
            break
    builder.finish(Ending("length", None))
    seen.append(builder.output.text)
    for before, after in itertools.pairwise(seen):
        assert after.startswith(before)


@settings(max_examples=200, deadline=None)
@given(text=TEXTS, stops=STOPS)
def test_no_more_is_held_back_than_could_begin_a_stop_string(tokenizer, text, stops):
    builder = builder_for(tokenizer, stop=stops)
    if builder.append(tokenizer.encode(text), None).stop_reason is None:
        held = text[len(builder.output.text) :]
        longest = max((len(text) - at for at in range(len(text)) for s in stops if s.startswith(text[at:])), default=0)
        assert len(held) == longest


def test_stop_string_split_over_tokens_is_cut_off_whole(tokenizer):
    builder = builder_for(tokenizer, stop="END")
    assert builder.append(list(b"some E"), None).stop_reason is None
    assert builder.output.text == "some "
    assert builder.append(list(b"ND!"), None).stop_reason == "END"
    assert builder.output.text == "some "
    assert bytes(builder.output.token_ids) == b"some END"


def test_held_back_text_is_released_when_it_turns_out_to_be_no_stop_string(tokenizer):
    builder = builder_for(tokenizer, stop=["abcd"])
    builder.append(list(b"xabc"), None)
    assert builder.output.text == "x"
    builder.append(list(b"e"), None)
    assert builder.output.text == "xabce"


def test_earliest_of_several_stop_strings_in_one_token_wins():
    ids, stream = words("so: ", "one two three")
    builder = CompletionBuilder(0, SamplingParams(stop=["three", "two", "e t"]), stream)
    assert builder.append(ids, None).stop_reason == "e t"
    assert builder.output.text == "so: on"


def test_stop_string_that_overlaps_its_own_beginning_is_found():
    ids, stream = words("aa", "ab", "b")
    builder = CompletionBuilder(0, SamplingParams(stop=["aaab"], include_stop_str_in_output=True), stream)
    assert builder.append(ids, None).stop_reason == "aaab"
    assert builder.output.text == "aaab"
    assert builder.output.token_ids == [0, 1]


def test_stop_string_completed_by_the_held_back_bytes_at_the_end_is_found(tokenizer):
    builder = builder_for(tokenizer, stop="x\ufffd")
    assert builder.append([*b"ax", 0xC3], None).stop_reason is None
    builder.finish(Ending("length", None))
    assert (builder.output.text, builder.output.finish_reason) == ("a", "stop")
    assert builder.output.stop_reason == "x\ufffd"


def test_end_releases_half_a_character_as_a_replacement(tokenizer):
    builder = builder_for(tokenizer)
    builder.append([*b"a", 0xF0, 0x9F], None)
    assert builder.output.text == "a"
    builder.finish(Ending("length", None))
    assert builder.output.text == "a\ufffd"


@pytest.mark.parametrize(("include", "text"), [(False, "hi"), (True, "hi!")])
def test_stop_token_is_in_the_ids_and_in_the_text_only_when_asked(tokenizer, include, text):
    builder = builder_for(tokenizer, stop_token_ids=[ord("!")], include_stop_str_in_output=include)
    assert builder.append(list(b"hi!"), None).stop_reason is None
    builder.finish(Ending("stop", ord("!")))
    output = builder.output
    assert (output.text, output.finish_reason, output.stop_reason) == (text, "stop", ord("!"))
    assert bytes(output.token_ids) == b"hi!"


def test_end_of_sequence_gives_no_text(tokenizer):
    builder = builder_for(tokenizer)
    builder.append([*b"ok", EOS_ID], None)
    builder.finish(Ending("stop", None))
    assert (builder.output.text, builder.output.stop_reason) == ("ok", None)
    assert builder.output.token_ids[-1] == EOS_ID


def test_special_tokens_are_shown_when_they_are_not_skipped(tokenizer):
    builder = builder_for(tokenizer, skip_special_tokens=False)
    builder.append([*b"a", EOS_ID, *b"b"], None)
    assert builder.output.text == f"a{EOS}b"


@pytest.mark.parametrize("reason", ["length", "abort", "stop"])
def test_finish_reason_is_the_engines_when_no_stop_string_came_before(tokenizer, reason):
    builder = builder_for(tokenizer, stop="z")
    builder.append(list(b"abc"), None)
    assert builder.output.finish_reason is None
    builder.finish(Ending(reason, None))
    assert (builder.output.finish_reason, builder.output.stop_reason) == (reason, None)


def test_stop_string_wins_over_a_length_limit_reached_by_the_same_token(tokenizer):
    builder = builder_for(tokenizer, stop="c")
    assert builder.append(list(b"abc"), None).stop_reason == "c"
    builder.finish(Ending("length", None))
    assert (builder.output.finish_reason, builder.output.stop_reason) == ("stop", "c")


def test_stop_string_before_the_minimum_number_of_tokens_does_not_end_it(tokenizer):
    builder = builder_for(tokenizer, stop="b", min_tokens=3)
    assert builder.append(list(b"abc"), None).stop_reason is None
    assert builder.output.text == "abc"


def test_without_a_tokenizer_there_are_ids_and_no_text():
    builder = CompletionBuilder(2, SamplingParams(), None)
    assert builder.append([5, 6], None).stop_reason is None
    builder.finish(Ending("length", None))
    assert (builder.output.index, builder.output.text, builder.output.token_ids) == (2, "", [5, 6])
    assert builder.output.logprobs is None and builder.output.cumulative_logprob is None


def sampled(*steps: tuple[float, list[int]]) -> SimpleNamespace:
    """Own logprob and the best ids of each step; the best have logprobs -1, -2, ..."""
    top = np.array([ids for _, ids in steps])
    values = np.broadcast_to(-1.0 - np.arange(top.shape[1]), top.shape)
    return SimpleNamespace(logprobs=np.array([own for own, _ in steps]), top_ids=top, top_logprobs=values)


def test_logprobs_hold_the_sampled_token_and_as_many_of_the_best_as_asked(tokenizer):
    builder = builder_for(tokenizer, logprobs=2)
    a, b, c, d = b"abcd"
    builder.append([a, d], sampled((-1.0, [a, b, c]), (-9.0, [b, a, c])))
    first, second = builder.output.logprobs
    assert first == {a: Logprob(-1.0, 1, "a"), b: Logprob(-2.0, 2, "b")}
    assert second == {d: Logprob(-9.0, None, "d"), b: Logprob(-1.0, 1, "b"), a: Logprob(-2.0, 2, "a")}
    assert builder.output.cumulative_logprob == -10.0


def test_logprobs_0_reports_only_the_sampled_token_with_its_rank(tokenizer):
    builder = builder_for(tokenizer, logprobs=0)
    a, b, c, _ = b"abcd"
    builder.append([c], sampled((-3.0, [a, b, c])))
    assert builder.output.logprobs == [{c: Logprob(-3.0, 3, "c")}]


def test_logprobs_end_with_the_token_that_completed_the_stop_string(tokenizer):
    builder = builder_for(tokenizer, logprobs=1, stop="b")
    a, b, c, d = b"abcd"
    builder.append([a, b, c, d], sampled(*[(-1.0, [a, b])] * 4))
    assert builder.output.token_ids == [a, b]
    assert len(builder.output.logprobs) == 2
    assert builder.output.cumulative_logprob == -2.0


@settings(max_examples=200, deadline=None)
@given(text=TEXTS, stops=STOPS, back=st.integers(0, 60), sizes=st.lists(st.integers(1, 5), min_size=60, max_size=60))
def test_deltas_join_to_the_whole_also_when_tokens_come_again(tokenizer, text, stops, back, sizes):
    builder, expected = builder_for(tokenizer, stop=stops), builder_for(tokenizer, stop=stops)
    ids = tokenizer.encode(text)
    expected.append(ids, None, Ending("length"))
    ids = ids[: len(expected.output.token_ids)]
    builder.append(ids[:-1], None)
    builder.rewind(min(back, max(0, len(ids) - 1)))
    whole = builder.output.text
    for delta in iter(lambda: builder.append(ids[len(builder.output.token_ids) :][: sizes.pop()], None), None):
        whole += delta.text
        assert as_of(expected.output, delta).token_ids == builder.output.token_ids
        assert as_of(builder.output, delta).text == whole == builder.output.text
        if delta.finish_reason or len(builder.output.token_ids) == len(ids):
            break
    assert whole + builder.finish(Ending("length")).text == expected.output.text
    assert builder.output == expected.output
