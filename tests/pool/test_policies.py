"""Whose turn it is: quotas, group sizes, order, and that nobody starves, under random arrivals."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.pool.attainment import tokens_in_time
from jaxllm.pool.decode_rounds import DecodeRounds
from jaxllm.pool.policies import TokenLevel, make_policy
from jaxllm.pool.prefill_groups import PrefillGroups
from jaxllm.pool.quotas import quotas


@dataclass
class Fixed:
    """The same costs for every model."""

    step: float = 0.02
    switch: float = 0.5
    prefill: float = 0.1
    batch: int = 4
    steps: dict[str, float] = field(default_factory=dict)

    def prefill_seconds(self, model, item):
        return self.prefill

    def step_seconds(self, model, num_requests):
        return self.steps.get(model, self.step)

    def switch_seconds(self, model):
        return self.switch

    def max_batch(self, model):
        return self.batch


def test_quotas_are_the_papers():
    found = quotas([0.020, 0.025, 0.030], 1.5, tbt=0.1, longest=4.0)
    assert found.alpha == pytest.approx(0.8625)
    assert found.seconds == pytest.approx((2.6667, 3.3333, 4.0), abs=1e-4)


def test_turns_shrink_with_what_is_promised_between_tokens():
    """Else a first token, promised a tenth as late, would wait for turns of four seconds."""
    paper, tenth = ([scale * t for t in (0.020, 0.025, 0.030)] for scale in (1.0, 0.1))
    assert quotas(tenth, 0.15, tbt=0.01).seconds == pytest.approx([q / 10 for q in quotas(paper, 1.5).seconds])
    assert max(quotas([0.3, 0.3], 1.0, tbt=1.0).seconds) == pytest.approx(4.0)


def test_quotas_of_a_light_round_take_the_least_alpha():
    found = quotas([0.005, 0.005], 0.1, tbt=0.1, longest=4.0)
    assert found.alpha == 0.5
    assert found.seconds == pytest.approx((0.1 / (20 * 0.4),) * 2)


@given(st.lists(st.floats(0.001, 0.5), min_size=1, max_size=8), st.just(0.0) | st.floats(1e-6, 10))
def test_no_quota_is_longer_than_allowed_and_each_gives_its_batch_the_same_slack(steps, switching):
    found = quotas(steps, switching, tbt=0.1, longest=4.0)
    assert all(0 < seconds <= 4.0 + 1e-9 for seconds in found.seconds)
    if switching:  # a round at this alpha: every batch's tokens cover the round's time
        round_seconds = sum(found.seconds) + switching
        slack = [q * 0.1 / t for q, t in zip(found.seconds, steps, strict=True)]
        assert slack == pytest.approx([round_seconds / found.alpha] * len(steps), rel=1e-6)


def test_a_round_takes_its_quotas_from_the_costs():
    costs = Fixed(steps={"a": 0.020, "b": 0.025, "c": 0.030}, switch=0.5)
    rounds = DecodeRounds([0], costs)
    for model in "abc":
        rounds.add(model, model)
    order = []
    for _ in range(3):
        batch, seconds = rounds.take(0, rounds.head(0))
        order.append((batch.model, round(seconds, 3)))
    assert order == [("a", 2.667), ("b", 3.333), ("c", 4.0)]
    assert rounds.take(0, "a") is None, "once a round"
    assert rounds.head(0, "c") == "c", "a new round begins with the model that needs no switch"


def test_batches_of_a_model_are_side_by_side_and_no_larger_than_fits():
    rounds = DecodeRounds([0], Fixed(batch=2))
    for i, model in enumerate("abaabaa"):
        rounds.add(i, model)
    order = []
    for _ in range(4):
        batch, _ = rounds.take(0, rounds.head(0))
        order.append((batch.model, list(batch.members)))
    assert order == [("a", [0, 2]), ("a", [3, 5]), ("a", [6]), ("b", [1, 4])]


def test_a_request_joins_a_group_of_its_model_wherever_and_else_goes_to_the_least_loaded():
    groups = PrefillGroups([0, 1], Fixed(), max_group=2)
    assert [groups.add(i, m) for i, m in enumerate("abaab")] == [0, 1, 0, 1, 1]
    assert groups.take(1) == [1, 4] and groups.take(1) == [3]


def test_a_group_in_service_takes_no_more_than_eight():
    groups = PrefillGroups([0], Fixed())
    for i in range(3):
        groups.add(i, "a")
    groups.add("x", "b")
    assert groups.take(0) == [0, 1, 2]
    for i in range(3, 20):
        groups.add(i, "a")
    assert groups.joining(0) == list(range(3, 8))
    assert groups.take(0) == ["x"]
    assert groups.take(0) == list(range(8, 16))


def test_prefill_and_decode_instances_of_their_own():
    policy = TokenLevel(Fixed(), prefill=[0, 1], decode=[2])
    assert policy.add("r", "a") == 0 and policy.add("s", "b") == 1
    assert policy.next_turn(0).starts == ("r",) and policy.next_turn(2) is None
    assert policy.prefilled("r") == 2
    turn = policy.next_turn(2)
    assert (turn.model, turn.starts, turn.members) == ("a", (), ("r",)) and 0 < turn.seconds <= 4.0
    policy.end("r"), policy.end("s")
    assert policy.next_turn(0) is policy.next_turn(1) is policy.next_turn(2) is None


def test_who_waits_is_fetched_next():
    policy = TokenLevel(Fixed())
    for i, model in enumerate("abca"):
        policy.add(i, model)
    assert policy.next_turn(0).model == "a"
    assert policy.upcoming(0) == ["b", "c"]


def test_tokens_in_time_count_anew_after_a_miss():
    times = [0.9, 1.5, 1.6, 2.9]  # deadlines 1, then 1.1 (missed), 1.6, 1.7 (missed)
    assert tokens_in_time(0.0, times, ttft=1.0, tpot=0.1) == 2


# A clock and one instance that carries turns out, in the smallest way that has every part of it.


def carry_out(name, arrivals, costs, tokens):
    """Run arrivals [(time, model)] to the end; per request (first token, last token), and the models of the turns."""
    policy = make_policy(name, costs)
    clock, current, left, waiting, seen = 0.0, None, {}, sorted(arrivals), []
    first, last, prefill_order, starts_of_turn = {}, {}, defaultdict(list), []
    model_of = dict(enumerate(model for _, model in waiting))
    coming = list(enumerate(waiting))

    def arrive():
        while coming and coming[0][1][0] <= clock:
            item, (_, model) = coming.pop(0)
            policy.add(item, model)

    while coming or left or any(i not in last for i in model_of):
        arrive()
        if (turn := policy.next_turn(0)) is None:
            clock = coming[0][1][0]
            continue
        others = {model_of[i] for i in model_of if i not in last} - {turn.model}
        if turn.model != current:
            clock, current = clock + costs.switch, turn.model
        seen.append(turn.model)
        active, starts, started = [i for i in turn.members if i not in last], list(turn.starts), len(turn.starts)
        ends = clock + turn.seconds
        while starts or active:
            if starts:
                item = starts.pop(0)
                assert model_of[item] == turn.model
                clock += costs.prefill
                prefill_order[turn.model].append(item)
                first[item], left[item] = clock, tokens
                policy.prefilled(item)
                active.append(item)
                ends = clock + turn.seconds
            elif clock >= ends:
                break
            else:
                clock += costs.step
                for item in active:
                    left[item] -= 1
                    if left[item] <= 0:
                        last[item] = clock
                        policy.end(item)
                        del left[item]
                active = [i for i in active if i in left]
            arrive()
            more = policy.joining(0)
            started += len(more)
            starts += more
        starts_of_turn.append((turn.model, started, bool(others)))
    return first, last, seen, prefill_order, starts_of_turn


ARRIVALS = st.lists(
    st.tuples(st.floats(0, 20).map(lambda t: round(t, 2)), st.sampled_from("abcde")), min_size=1, max_size=40
)


@settings(deadline=None, max_examples=60)
@given(ARRIVALS, st.integers(1, 60))
def test_every_request_ends_in_its_models_order_and_nobody_waits_beyond_the_groups_before_it(arrivals, tokens):
    costs = Fixed()
    arrivals = sorted(arrivals)
    first, last, _, order, starts = carry_out("token", arrivals, costs, tokens)
    assert len(last) == len(arrivals)
    for items in order.values():
        assert items == sorted(items), "first come, first served within a model"
    for _, started, others_wait in starts:
        assert started <= 8 or not others_wait
    # Between two groups stands at most one decode turn, and every switch is paid: a bound on any wait.
    longest = 4.0 + 8 * costs.prefill + costs.switch
    for item, (arrival, model) in enumerate(arrivals):
        ahead = sum(1 for time, _ in arrivals[:item] if first[arrivals.index((time, _))] > arrival)
        assert first[item] - arrival <= 2 * longest * (ahead + 2), (item, model)


@settings(deadline=None, max_examples=60)
@given(ARRIVALS, st.integers(1, 60))
def test_request_level_serves_everybody_too_and_never_leaves_a_model_with_requests_under_way(arrivals, tokens):
    first, last, _, _, _ = carry_out("request", sorted(arrivals), Fixed(), tokens)
    assert len(last) == len(arrivals)
    by_model = defaultdict(list)
    for item, (_, model) in enumerate(sorted(arrivals)):
        by_model[model].append((first[item], last[item]))
    for model, spans in by_model.items():
        for other, others in by_model.items():
            if other != model:
                assert all(b <= c or d <= a for a, b in spans for c, d in others), "two models interleave"


def test_token_level_gives_a_second_model_its_first_token_while_the_first_one_decodes():
    costs = Fixed()
    arrivals = [(0.0, "a"), (0.1, "b")]
    token, request = (carry_out(name, arrivals, costs, 1000)[0] for name in ("token", "request"))
    assert token[1] < 6.0 < 20.0 < request[1]


def test_prompts_go_before_those_that_decode_and_after_as_many_seconds_as_a_turn_may_last_one_of_these_does():
    first, _, turns, _, _ = carry_out("token", [(0.0, "a"), *((1.0, name) for name in "bcdefgh")], Fixed(), 1000)
    assert "".join(turns).startswith("aabcdefgah"), "six times 0.6 s, and a seventh would pass 4 s"
    turn, prompt = 4.0 + 0.6, 0.6
    assert first[6] - 1.0 <= turn + 6 * prompt and first[7] - 1.0 <= 2 * turn + 8 * prompt


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("add end prefilled turn".split())), max_size=80))
def test_requests_may_end_anywhere(actions):
    """Aborts in every state leave nothing behind."""
    policy, waiting, decoding, number = TokenLevel(Fixed()), {}, {}, 0
    for model, action in actions:
        if action == "add":
            policy.add(number, model)
            waiting[number] = model
            number += 1
        elif action == "end" and (waiting or decoding):
            item = next(iter(waiting or decoding))
            waiting.pop(item, None), decoding.pop(item, None)
            policy.end(item)
        elif action == "turn" and (turn := policy.next_turn(0)) is not None:
            for item in turn.starts:
                policy.prefilled(item)
                decoding[item] = waiting.pop(item)
            assert all(decoding.get(item) == turn.model for item in turn.members)
            assert turn.seconds <= 4.0 and not math.isnan(turn.seconds)
    for item in [*waiting, *decoding]:
        policy.end(item)
    assert policy.next_turn(0) is None and policy.upcoming(0) == []


def test_requests_that_stay_where_they_were_prefilled_are_spread_over_instances_and_keep_to_their_kind():
    policy = TokenLevel(Fixed(batch=2), prefill=[0, 1, 2], decode=[0, 1, 2])
    where = []
    for item, model in (("a1", "a"), ("b1", "b"), ("a2", "a"), ("c1", "c"), ("a3", "a")):
        instance = policy.add(item, model)
        assert policy.next_turn(instance).starts == (item,)
        where.append(policy.prefilled(item))
    assert where[:4] == [0, 1, 0, 2], "a free instance for each model, and its own kind's for more of it"
    assert where[4] == 0, "that group is open still"
    policy.end("b1")
    assert policy.add("d1", "d") == 1, "where nothing runs any more"
