"""What process 0 sends to the others, as bytes."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jaxllm.config import EngineConfig
from jaxllm.config.sampling import SamplingParams
from jaxllm.families.presets import model_config
from jaxllm.runner.batch import Dispatch, lay_out
from jaxllm.runner.messages import Reset, Stop, WarmUp, decode, encode
from jaxllm.runner.programs import PROGRAMS, SAMPLING, TIERS
from jaxllm.runner.shapes import runner_shapes
from jaxllm.scheduling.plan import Chunk, IterationPlan
from jaxllm.scheduling.request import Held, Request
from jaxllm.sharding.mesh import Placement, make_mesh
from jaxllm.sharding.rules import load_rules
from jaxllm.weights.abstract import make_model


@pytest.fixture(scope="module")
def parts():
    config = EngineConfig(load_format="dummy", matmul_backend="xla", max_model_len=64, max_num_seqs=8)
    model = make_model(config, model_config("gpt2"), Placement(make_mesh("tp=1"), load_rules("megatron")))
    return model, runner_shapes(config, model)


def through(message, parts):
    model, shapes = parts
    return decode(encode(message), lambda name: jax.tree.structure(PROGRAMS[name].inputs(model, shapes, 1)))


@pytest.mark.parametrize("name", [name for name in PROGRAMS if name != "put"])
def test_inputs_of_every_program_survive_the_wire(parts, name):
    model, shapes = parts
    rng = np.random.default_rng(0)
    inputs = PROGRAMS[name].inputs(model, shapes, 4)
    inputs = jax.tree.map(lambda a: rng.integers(0, 2, np.shape(a)).astype(np.asarray(a).dtype), inputs)
    back = through(Dispatch(name, 4, inputs), parts)
    assert (back.program, back.bucket) == (name, 4)
    assert jax.tree.structure(back.inputs) == jax.tree.structure(inputs)
    for got, sent in zip(jax.tree.leaves(back.inputs), jax.tree.leaves(inputs), strict=True):
        np.testing.assert_array_equal(got, sent)
        assert got.dtype == sent.dtype


def test_masks_travel_only_for_requests_that_have_a_constraint(parts):
    class OnlySeven:
        is_fixed = False

        def fill_mask(self, row: np.ndarray) -> None:
            row[0] = 1 << 7

    def messages(constraint: OnlySeven | None) -> list[bytes]:
        params = SamplingParams(temperature=0.5, seed=7)
        request = Request("one", [1, 2, 3], params, limit=9, held=Held(slot=2), constraint=constraint)  # type: ignore[arg-type]
        return [encode(d) for d in lay_out(IterationPlan([Chunk(request, 2, 1, 1)]), parts[1]).dispatches]

    mask_bytes = parts[1].mask_words * 4
    assert all(len(message) < 3 * mask_bytes for message in messages(None))
    with_mask = messages(OnlySeven())
    (mask,) = [m for m in (through_bytes(m, parts) for m in with_mask) if m.program == "mask"]
    slots, masks = mask.inputs
    assert slots[0] == 2 and (slots[1:] == parts[1].spare_slot).all()
    assert masks[0, 0, 0] == 1 << 7 and not masks[0, 0, 1:].any() and not masks[1:].any()


def through_bytes(message: bytes, parts) -> Dispatch:
    model, shapes = parts
    back = decode(message, lambda name: jax.tree.structure(PROGRAMS[name].inputs(model, shapes, 1)))
    assert isinstance(back, Dispatch)
    return back


@pytest.mark.parametrize("message", [Reset(), Stop(), WarmUp(()), WarmUp((SAMPLING, TIERS))])
def test_what_is_no_program_survives_the_wire(parts, message):
    assert through(message, parts) == message


@pytest.mark.parametrize("message", [b"", b"\xff" * 20, b"\x00" * 7, encode(Reset()) + b"x", encode(WarmUp(()))[:1]])
def test_bytes_that_are_no_message_are_refused(parts, message):
    with pytest.raises(ValueError, match="not a message"):
        through_bytes(message, parts)
