"""`extend`, `truncate` and `fork`: any sequence that a caller puts together goes on as the model would."""

from __future__ import annotations

import random

import pytest

from jaxllm.config.sampling import SamplingParams
from jaxllm.scheduling.request import Ending
from tests.helpers.fake_device import next_token
from tests.helpers.fake_llm import FakeModel


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> FakeModel:
    return FakeModel(tmp_path_factory.mktemp("fake"))


@pytest.mark.parametrize("seed", range(30))
def test_whatever_a_caller_appends_drops_and_forks_the_next_token_is_the_models(fake: FakeModel, seed: int) -> None:
    rng = random.Random(seed)
    engine = fake.engine(num_pages=rng.choice([32, 60]), max_num_seqs=rng.choice([2, 4])).engine
    params = SamplingParams(temperature=0.0, max_tokens=90, ignore_eos=True)
    prompt = [rng.randrange(97, 123) for _ in range(rng.randrange(1, 20))]
    alive = [engine.add_request(prompt, params, stepwise=True)]
    for _ in range(25):
        for _ in range(300):
            if all(request.on_hold for request in alive):
                break
            engine.step()
        for request in alive:
            assert request.on_hold, "a request got no token"
            assert request.token_ids[-1] == next_token(request.token_ids[:-1])
        request = rng.choice(alive)
        if len(alive) < 5 and rng.random() < 0.4:
            alive.append(engine.fork(request))
        if len(alive) > 1 and rng.random() < 0.2:
            engine.finish(alive.pop(rng.randrange(len(alive))), Ending("abort"))
        for request in alive:
            if rng.random() < 0.5 or len(request.token_ids) > 60:
                engine.truncate(request, rng.randrange(len(prompt), min(60, len(request.token_ids)) + 1))
            engine.extend(request, [rng.randrange(97, 123) for _ in range(rng.choice([0, 1, 1, 2, 9]))])
    for request in alive:
        engine.finish(request, Ending("abort"))
    while engine.has_work:
        engine.step()
    engine.pool.check([])
    assert engine.pool.num_free == engine.pool.num_usable


def test_tokens_beyond_the_limit_are_refused(fake: FakeModel) -> None:
    engine = fake.engine().engine
    request = engine.add_request([1, 2], SamplingParams(temperature=0.0, max_tokens=3), stepwise=True)
    while not request.on_hold:
        engine.step()
    with pytest.raises(ValueError, match="leave none of the request's 5"):
        engine.extend(request, [1, 2])
    assert engine.is_sound
