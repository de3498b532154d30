"""A profile says what was measured: planted terms are found, files are read back, bad ones refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from jaxllm.bench.calibrate import Measured, Prompts, fit, fit_all, grid
from jaxllm.roofline.iteration_time import DECODE, LOOP, RAGGED, IterationWork
from jaxllm.roofline.profile import Profile, Terms, load_profile

PLANTED = {
    (RAGGED, 64): Terms(2e-3, 1e-5, 3e-9, 2e-8, 1e-4),
    (RAGGED, 512): Terms(6e-3, 2e-5, 2e-9, 1e-8, 2e-4),
    (DECODE, 8): Terms(3e-3, 1e-4, 0.0, 2e-8, 0.0),
    (LOOP, 8): Terms(2e-3, 1e-4, 0.0, 2e-8, 0.0),
}


def measured(noise: float) -> list[Measured]:
    random = np.random.default_rng(0)
    found = []
    for (program, bucket), terms in PLANTED.items():
        for _ in range(200):
            tokens = int(random.integers(65 if bucket == 512 else 1, bucket + 1))
            pairs = float(random.integers(0, 400_000)) if program == RAGGED else 0.0
            admitted = int(random.integers(0, 3)) if program == RAGGED else 0
            work = IterationWork(program, tokens, 1, pairs, 0.0, float(random.integers(0, 60_000)), admitted)
            late = 5.0 if noise and random.random() < 0.03 else 1.0
            found.append(
                Measured(work, bucket, terms.seconds(work) * late * float(1 + noise * random.standard_normal()))
            )
    return found


def profile(noise: float = 0.0) -> Profile:
    return Profile(
        device="here",
        model="m",
        num_devices=1,
        flops_per_s=1e12,
        bytes_per_s=1e10,
        programs=fit_all(measured(noise)),
        engine={"max_num_seqs": 8, "num_pages": 100, "page_size": 16},
    )


def test_planted_terms_are_found():
    for (program, bucket), terms in PLANTED.items():
        found = profile().programs[program][bucket]
        assert (found.base, found.tokens, found.keys) == pytest.approx((terms.base, terms.tokens, terms.keys), rel=1e-6)


def test_noise_and_outliers_cost_little():
    fitted = profile(0.05)
    errors = [fitted.seconds(one.work) / one.seconds - 1 for one in measured(0.0)]
    assert np.abs(errors).max() < 0.1 and np.abs(errors).mean() < 0.02


def test_measurements_that_are_far_too_short_do_not_bend_the_fit():
    terms, random = Terms(20e-3, 0.0, 0.0, 2.6e-7), np.random.default_rng(0)
    group = []
    for keys in random.permutation([500.0] * 11 + [80_000.0] * 49 + [240_000.0] * 76):
        work = IterationWork(DECODE, 1, 1, 0.0, 0.0, float(keys))
        group.append(Measured(work, 1, terms.seconds(work) * float(1 + 0.08 * random.standard_normal())))
    short = next(i for i, one in enumerate(group) if one.work.decode_keys < 1000)
    group[short] = dataclasses.replace(group[short], seconds=0.3e-3)
    found = fit(group)
    for keys in (0.0, 500.0, 80_000.0, 240_000.0):
        work = IterationWork(DECODE, 1, 1, 0.0, 0.0, keys)
        assert found.seconds(work) == pytest.approx(terms.seconds(work), rel=0.08)


def test_a_profile_is_read_back(tmp_path):
    profile().save(tmp_path / "p.json")
    read = load_profile(tmp_path / "p.json")
    assert read == profile()
    work = IterationWork(RAGGED, 65, 1, 1000.0, 0.0, 0.0)
    assert read.seconds(work) == pytest.approx(6e-3 + 65 * 2e-5 + 2e-6)
    (tmp_path / "p.json").write_text('{"format": "other"}')
    with pytest.raises(ValueError, match="its format is not jaxllm-profile-1; `jaxllm bench calibrate` writes one"):
        load_profile(tmp_path / "p.json")


def test_the_grid_stays_within_the_cache_and_reaches_every_bucket_and_full_caches():
    buckets = (1, 4, 8, 16, 32)
    points = list(grid(rows=buckets, longest=8192, capacity=8192, budget=512))
    assert all(p.rows * (p.context + 48) + p.count * p.prompt <= 8192 for p in points)
    assert {p.rows for p in points} == {0, *buckets, 3, 6, 12, 24} and max(p.prompt for p in points) == 2048
    for rows in buckets:
        for streamed in (True, False):
            contexts = [p.context for p in points if (p.rows, p.streamed, p.prompt) == (rows, streamed, 0)]
            assert min(contexts) == 16 and rows * max(contexts) > 0.65 * 8192 and len(contexts) == 3
        assert rows * max(p.context for p in points if p.rows == rows and p.prompt) > 0.6 * 8192
    assert not [p for p in grid(rows=buckets, longest=128, capacity=256, budget=64) if p.rows * p.context > 256]


def test_a_rows_longer_prompt_begins_with_its_shorter_one():
    prompts = Prompts(1000)
    assert prompts.of_row(3, 700)[:500] == prompts.of_row(3, 500) != prompts.of_row(4, 500)
    assert prompts.new(50) != prompts.new(50)
