"""The device sampler equals plain NumPy: what is kept, what is drawn, what is reported.

One static shape for every call, so that it is compiled once. Dimension letters: R rows, V vocabulary, L history.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from scipy import special, stats

from jaxllm.runner.sampler import NOT_FINITE, SamplingRows, sample, sample_greedy

R, V, L, STOPS = 1024, 24, 12, 4
NEUTRAL = {
    "temperature": 1.0,
    "top_p": 1.0,
    "min_p": 0.0,
    "presence": 0.0,
    "frequency": 0.0,
    "repetition": 1.0,
    "top_k": 0,
    "seed": 0,
    "prompt_len": 0,
    "min_len": 0,
    "num_logprobs": -1,
}
INTEGERS = {"top_k": np.int32, "seed": np.uint64, "prompt_len": np.int32, "min_len": np.int32, "num_logprobs": np.int32}
compiled = jax.jit(sample)
compiled_greedy = jax.jit(sample_greedy)


def rows(**changes) -> SamplingRows:
    """Neutral parameters with some changed: one value for all rows, or one for each. Seeds are row numbers."""
    fields = {
        "bias_ids": np.full((R, 300), V, np.int32),
        "bias_values": np.zeros((R, 300), np.float32),
        "masked": np.zeros(R, bool),
        "allowed": np.zeros((R, -(-V // 32)), np.int32),
    }
    for name, value in (NEUTRAL | {"seed": np.arange(R)} | changes).items():
        if name not in ("bias_ids", "bias_values", "masked", "allowed"):
            value = np.broadcast_to(value, R).astype(INTEGERS.get(name, np.float32))
        fields[name] = value
    fields["seed"] = np.stack([fields["seed"] >> np.uint64(32), fields["seed"]], 1).astype(np.uint32)
    return SamplingRows(**fields)


def run(logits, params: SamplingRows, history=None, length=5, stop_ids=None):
    logits = np.broadcast_to(np.asarray(logits, np.float32), (R, V))
    history = np.zeros((R, L), np.int32) if history is None else history.astype(np.int32)
    length = np.broadcast_to(length, R).astype(np.int32)
    stop_ids = np.full((R, STOPS), -1, np.int32) if stop_ids is None else stop_ids.astype(np.int32)
    return jax.tree.map(np.asarray, compiled(logits, params, history, length, stop_ids))


def tokens(logits, params: SamplingRows, **kwargs) -> np.ndarray:
    return run(logits, params, **kwargs).tokens


def flat_logits(seed: int) -> np.ndarray:
    """Distinct, and so flat that 1024 draws see every token that may be drawn."""
    return np.random.default_rng(seed).permutation(np.linspace(-0.7, 0.7, V)).astype(np.float32)


def kept(logits: np.ndarray, *, min_p=0.0, top_k=0, top_p=1.0) -> set[int] | None:
    """Ids left by min-p, then top-k, then top-p of what is left; None when a threshold is too close to call."""
    order = np.argsort(-logits, kind="stable")
    probs = special.softmax(logits[order].astype(np.float64))
    close = np.abs(probs - min_p * probs[0]).min() < 1e-5 and min_p > 0
    order, probs = order[probs >= min_p * probs[0]], probs[probs >= min_p * probs[0]]
    if top_k > 0:
        order, probs = order[:top_k], probs[:top_k]
    mass = np.cumsum(probs / probs.sum())
    if top_p < 1:
        close |= np.abs(mass - top_p).min() < 1e-5
        order = order[: int(np.searchsorted(mass, top_p)) + 1]
    return None if close else set(order.tolist())


def check_support(logits: np.ndarray, **filters) -> bool:
    expected = kept(logits, **filters)
    if expected is None:
        return False
    assert set(tokens(logits, rows(**filters)).tolist()) == expected, filters
    return True


def test_greedy_takes_the_lowest_index_among_equals():
    logits = np.random.default_rng(0).integers(0, 3, (R, V)).astype(np.float32)
    first = np.array([row.tolist().index(row.max()) for row in logits])
    np.testing.assert_array_equal(np.asarray(compiled_greedy(logits).tokens), first)
    np.testing.assert_array_equal(tokens(logits, rows(temperature=0.0)), first)


@pytest.mark.parametrize("vocab", [1, 127, 128, 129, 1000])
def test_greedy_finds_the_maximum_in_a_vocabulary_of_any_size(vocab):
    logits = np.random.default_rng(vocab).integers(-3, 3, (8, vocab)).astype(np.float32)
    expected = [row.tolist().index(row.max()) for row in logits]
    assert np.asarray(sample_greedy(logits).tokens).tolist() == expected


def test_top_k_keeps_exactly_the_k_largest():
    for k in (1, 2, 7, V - 1, V, V + 1, 2**31 - 1):
        assert check_support(flat_logits(k % 100), top_k=k)


@pytest.mark.parametrize("off", [0, -1])
def test_top_k_of_0_or_minus_1_keeps_everything(off):
    assert set(tokens(flat_logits(1), rows(top_k=off)).tolist()) == set(range(V))


def test_top_p_keeps_the_smallest_set_that_reaches_the_mass():
    ps = [1e-9, 0.01, 0.07, 0.2, 0.33, 0.5, 0.75, 0.9, 0.97, 0.999, 1.0]
    assert sum(check_support(flat_logits(i), top_p=p) for i, p in enumerate(ps)) >= 10


def test_min_p_keeps_what_is_likely_enough_beside_the_likeliest():
    ps = [0.0, 0.3, 0.45, 0.6, 0.8, 0.95, 1.0]
    assert sum(check_support(flat_logits(i), min_p=p) for i, p in enumerate(ps)) >= 6


def test_filters_apply_one_after_the_other():
    rng, checked = np.random.default_rng(0), 0
    for i in range(30):
        filters = {"top_k": int(rng.integers(1, V)), "top_p": float(rng.uniform(0.2, 1.0))}
        filters["min_p"] = float(rng.choice([0.0, 0.3, 0.5]))
        checked += check_support(flat_logits(i), **filters)
    assert checked >= 25


def test_top_p_is_a_share_of_what_top_k_left():
    logits = np.log(np.array([0.4, 0.2, 0.2 - 1e-3, *[0.201 / 21] * 21]))
    logits[3:] += np.linspace(0, 1e-3, 21)  # no ties
    # Alone, 0.7 needs three tokens; of the first two, which hold 0.6, the second is needed for 0.7 but not for 0.6.
    assert kept(logits, top_p=0.7) == {0, 1, 2}
    assert set(tokens(logits, rows(top_p=0.7)).tolist()) == {0, 1, 2}
    assert set(tokens(logits, rows(top_k=2, top_p=0.7)).tolist()) == {0, 1}
    assert set(tokens(logits, rows(top_k=2, top_p=0.6)).tolist()) == {0}


def test_temperature_comes_before_the_filters():
    logits = flat_logits(3)
    params = rows(temperature=0.5, top_p=0.6)
    assert set(tokens(logits, params).tolist()) == kept(logits / np.float32(0.5), top_p=0.6)
    assert kept(logits / np.float32(0.5), top_p=0.6) != kept(logits, top_p=0.6)


def test_each_row_has_its_own_filters():
    logits = flat_logits(4)
    k = np.arange(R) % 5
    drawn = tokens(logits, rows(top_k=k))
    for size in range(5):
        assert set(drawn[k == size].tolist()) == kept(logits, top_k=size)


def test_a_token_with_no_probability_is_never_drawn_by_any_filter():
    logits = flat_logits(5).astype(np.float64)
    logits[::2] = -np.inf
    for filters in ({}, {"top_k": V}, {"top_p": 0.9999999}, {"min_p": 1e-6}):
        assert set(tokens(logits, rows(**filters)).tolist()) == set(range(1, V, 2))


def penalised(logits, history, length, prompt_len, repetition, presence, frequency) -> np.ndarray:
    """The definitions, one row and token at a time."""
    out = logits.astype(np.float64).copy()
    for r in range(R):
        known = history[r, : length[r]].tolist()
        output = history[r, prompt_len[r] : length[r]].tolist()
        for token in set(known):
            value = out[r, token]
            out[r, token] = value / repetition[r] if value > 0 else value * repetition[r]
        for token in set(output):
            out[r, token] -= presence[r] + frequency[r] * output.count(token)
    return out


def check_argmax(expected: np.ndarray, actual: np.ndarray) -> None:
    """Equal wherever the best is clearly the best."""
    best = np.sort(expected, axis=1)
    clear = best[:, -1] - best[:, -2] > 1e-4
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(actual[clear], expected.argmax(axis=1)[clear])


@pytest.mark.parametrize("which", ["repetition", "presence", "frequency", "all"])
def test_penalties_equal_their_definitions(which):
    rng = np.random.default_rng(len(which))
    logits = rng.uniform(-1, 1, (R, V)).astype(np.float32)
    history = rng.integers(0, V, (R, L))
    history[:, 3:7] = history[:, 2:3]  # something occurs several times
    length = rng.integers(1, L + 1, R)
    prompt_len = rng.integers(0, length + 1)
    values = {"repetition": rng.uniform(0.5, 2, R), "presence": rng.uniform(-2, 2, R)}
    values["frequency"] = rng.uniform(-1, 1, R)
    neutral = {"repetition": np.ones(R), "presence": np.zeros(R), "frequency": np.zeros(R)}
    used = values if which == "all" else neutral | {which: values[which]}
    expected = penalised(logits, history, length, prompt_len, **used)
    assert (expected.argmax(axis=1) != logits.argmax(axis=1)).mean() > 0.05, "these penalties decide nothing"
    params = rows(temperature=0.0, prompt_len=prompt_len, **used)
    check_argmax(expected, tokens(logits, params, history=history, length=length))


def test_logit_bias_is_added_and_unused_entries_are_not():
    rng = np.random.default_rng(0)
    logits = rng.uniform(-1, 1, (R, V)).astype(np.float32)
    ids, values = np.full((R, 300), V, np.int32), rng.uniform(-2, 2, (R, 300)).astype(np.float32)
    expected = logits.astype(np.float64)
    for r in range(R):
        ids[r, : r % 4] = rng.permutation(V)[: r % 4]
        expected[r, ids[r, : r % 4]] += values[r, : r % 4]
    params = rows(temperature=0.0, bias_ids=ids, bias_values=values)
    check_argmax(expected, tokens(logits, params))


def test_stop_tokens_cannot_come_before_the_minimum_length():
    rng = np.random.default_rng(0)
    logits = rng.uniform(-1, 1, (R, V)).astype(np.float32)
    stop_ids = np.stack([np.array([*rng.permutation(V)[:2], -1, -1]) for _ in range(R)])
    logits[np.arange(R), stop_ids[:, 0]] = 5.0
    length = np.arange(R) % L
    expected = logits.copy()
    for r in range(R):
        if length[r] < 6:
            expected[r, stop_ids[r, :2]] = -np.inf
    params = rows(temperature=0.0, min_len=6)
    check_argmax(expected, tokens(logits, params, length=length, stop_ids=stop_ids))
    drawn = tokens(logits, rows(min_len=6), length=length, stop_ids=stop_ids)
    assert not (drawn[:, None] == stop_ids)[length < 6].any()


def test_a_draw_depends_on_seed_and_position_not_on_its_row_or_its_neighbours():
    rng = np.random.default_rng(0)
    logits, order = rng.uniform(-1, 1, (R, V)).astype(np.float32), rng.permutation(R)
    seed, length = rng.integers(0, 2**64, R, dtype=np.uint64), rng.integers(1, L, R)
    params = {"temperature": rng.uniform(0.5, 2, R), "top_k": rng.integers(0, 9, R)}
    base = tokens(logits, rows(seed=seed, **params), length=length)
    moved = {name: value[order] for name, value in params.items()}
    np.testing.assert_array_equal(
        tokens(logits[order], rows(seed=seed[order], **moved), length=length[order]), base[order]
    )
    half = np.arange(R) < R // 2  # the others change everything they can
    others = rows(
        seed=np.where(half, seed, 1),
        temperature=np.where(half, params["temperature"], 0.0),
        top_k=np.where(half, params["top_k"], 3),
        top_p=np.where(half, 1.0, 0.5),
        presence=np.where(half, 0.0, 2.0),
        num_logprobs=np.where(half, -1, 5),
    )
    changed = tokens(np.where(half[:, None], logits, 0.0), others, length=length)
    np.testing.assert_array_equal(changed[half], base[half])


@pytest.mark.parametrize("bit", [0, 31, 32, 33, 63])
def test_every_bit_of_a_seed_of_64_bits_counts(bit):
    seed = np.arange(R, dtype=np.uint64)
    logits = flat_logits(2)
    drawn, other = (tokens(logits, rows(seed=s)) for s in (seed, seed ^ np.uint64(1 << bit)))
    assert (drawn != other).mean() > 0.5


def test_a_row_whose_logits_are_no_numbers_samples_nothing_and_others_are_unharmed():
    logits = np.random.default_rng(3).normal(size=(R, V)).astype(np.float32)
    broken = logits.copy()
    broken[::4, 7], broken[1::4, 9], broken[2::4] = np.nan, np.inf, -np.inf
    broken[3::4, 0] = -np.inf  # a token that cannot come is nothing wrong
    logits[3::4, 0] = -np.inf
    is_broken = np.arange(R) % 4 != 3
    for params in (rows(temperature=0.7, top_p=0.9), rows(temperature=0.0), rows(temperature=0.7, num_logprobs=2)):
        drawn, expected = tokens(broken, params), tokens(logits, params)
        assert (drawn[is_broken] == NOT_FINITE).all() and (drawn[~is_broken] == expected[~is_broken]).all()
    assert ((np.asarray(compiled_greedy(broken).tokens) == NOT_FINITE) == is_broken).all()


def test_another_seed_or_another_position_draws_anew():
    logits = flat_logits(0)
    base = tokens(logits, rows(seed=np.arange(R)), length=5)
    same_by_chance = (special.softmax(logits) ** 2).sum()
    for other in (
        tokens(logits, rows(seed=np.arange(R) + R), length=5),
        tokens(logits, rows(seed=np.arange(R)), length=6),
    ):
        assert (other == base).mean() == pytest.approx(same_by_chance, abs=0.05)


@pytest.mark.parametrize("varies", ["seed", "position"])
def test_draws_follow_the_softmax(varies):
    logits, temperature, num_calls = np.random.default_rng(0).normal(0, 1.2, V).astype(np.float32), 0.8, 20
    counts = np.zeros(V)
    for call in range(num_calls):
        numbers = np.arange(R) + call * R
        changing = {"seed": numbers} if varies == "seed" else {"seed": 7}
        drawn = tokens(logits, rows(temperature=temperature, **changing), length=5 if varies == "seed" else numbers)
        counts += np.bincount(drawn, minlength=V)
    expected = special.softmax(logits.astype(np.float64) / temperature) * R * num_calls
    assert expected.min() > 5
    assert stats.chisquare(counts, expected).pvalue > 1e-6


def test_rows_of_temperature_0_are_greedy_beside_rows_that_draw():
    logits = np.random.default_rng(0).uniform(-1, 1, (R, V)).astype(np.float32)
    greedy = np.arange(R) % 3 == 0
    drawn = tokens(logits, rows(temperature=np.where(greedy, 0.0, 1.0), top_p=0.9))
    np.testing.assert_array_equal(drawn[greedy], logits.argmax(axis=1)[greedy])
    assert (drawn[~greedy] != logits.argmax(axis=1)[~greedy]).mean() > 0.5


def test_logprobs_are_of_the_raw_logits_whatever_else_is_asked():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (R, V)).astype(np.float32)
    ids, values = np.full((R, 300), V, np.int32), np.zeros((R, 300), np.float32)
    ids[:, 0], values[:, 0] = 3, 8.0
    params = rows(
        temperature=1.7, top_k=4, presence=1.0, repetition=1.5, num_logprobs=5, bias_ids=ids, bias_values=values
    )
    out = run(logits, params, history=rng.integers(0, V, (R, L)))
    expected = special.log_softmax(logits.astype(np.float64), axis=1)
    order = np.argsort(-expected, axis=1)[:, :20]
    np.testing.assert_allclose(out.logprobs, expected[np.arange(R), out.tokens], atol=1e-5)
    np.testing.assert_array_equal(out.top_ids, order)
    np.testing.assert_allclose(out.top_logprobs, np.take_along_axis(expected, order, axis=1), atol=1e-5)


def test_a_vocabulary_smaller_than_20_fills_up_with_impossible_entries():
    logits = np.random.default_rng(0).normal(0, 1, (2, 5)).astype(np.float32)
    first = dataclasses.replace(rows(num_logprobs=3), bias_ids=np.full((R, 300), 5, np.int32))
    two = jax.tree.map(lambda a: a[:2], first)
    out = sample(logits, two, np.zeros((2, L), np.int32), np.array([1, 1]), np.full((2, STOPS), -1))
    assert np.asarray(out.top_ids)[:, :5].tolist() == np.argsort(-logits, axis=1).tolist()
    assert np.isneginf(np.asarray(out.top_logprobs)[:, 5:]).all()


def test_masked_rows_sample_only_allowed_tokens():
    logits = np.random.default_rng(5).normal(size=(R, V)).astype(np.float32)
    allowed = np.zeros((R, -(-V // 32)), np.int32)
    masked = np.arange(R) % 2 == 0
    for row in range(R):
        token = (7 * row + 3) % V
        allowed[row, token // 32] = np.int32(np.uint32(1 << (token % 32)).astype(np.int32))
    got = tokens(logits, rows(temperature=1.0, masked=masked, allowed=allowed))
    free = tokens(logits, rows(temperature=1.0))
    expected = np.where(masked, (7 * np.arange(R) + 3) % V, free)
    np.testing.assert_array_equal(got, expected)
