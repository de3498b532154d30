"""Checkpoints survive conversion: the same numbers on another mesh, the same tensors on the way back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxllm.checkpoints import open_checkpoint
from jaxllm.families import read_config
from jaxllm.sharding.mesh import Placement, make_mesh
from jaxllm.sharding.rules import load_rules
from jaxllm.weights.abstract import make_model
from jaxllm.weights.convert import convert
from jaxllm.weights.loader import load_parameters
from jaxllm.weights.orbax import restore_parameters
from tests.helpers.patience import patience

NUM_MUTATIONS = 200


def abstract(folder: Path, mesh: str):
    from jaxllm.config import EngineConfig

    cfg = read_config(open_checkpoint(folder).config)
    return make_model(EngineConfig(dtype="float32"), cfg, Placement(make_mesh(mesh), load_rules("megatron")))


# olmo2: norms over heads; gpt_oss: sinks, fused tensors, experts; on tp=4 both have more shards than key heads.
@pytest.mark.parametrize(("name", "mesh"), [("olmo2", "tp=4"), ("gpt_oss", "ep=2,tp=4"), ("deepseek_v3", "ep=4")])
def test_orbax_restores_into_another_mesh(name: str, mesh: str, tiny_model, tmp_path: Path) -> None:
    source = tiny_model(name).folder
    folder = convert(str(source), tmp_path / "orbax", to="orbax", dtype="float32", mesh="tp=2")
    model = abstract(source, mesh)
    restored, loaded = restore_parameters(model, folder), load_parameters(model, open_checkpoint(source))
    for got, expected in zip(jax.tree.leaves(restored), jax.tree.leaves(loaded), strict=True):
        assert got.sharding == expected.sharding
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("name", ["gemma3", "phi3", "gpt2", "qwen3_moe", "gpt_oss"])
def test_safetensors_come_back_from_orbax_as_they_were(name: str, tiny_model, tmp_path: Path) -> None:
    source = tiny_model(name).folder
    convert(str(source), tmp_path / "orbax", to="orbax", dtype="float32")
    back = open_checkpoint(convert(str(tmp_path / "orbax"), tmp_path / "hf", to="safetensors", dtype="float32"))
    original = open_checkpoint(source)
    assert back.tensors.keys() == original.tensors.keys()
    for tensor in original.tensors:
        np.testing.assert_allclose(back.read(tensor), original.read(tensor), atol=1e-6, rtol=0, err_msg=tensor)


def test_vocabulary_rows_that_pad_the_mesh_are_zeros(tiny_model, tmp_path: Path) -> None:
    source = tiny_model("mistral").folder  # 96 rows on 5 devices would need 4 more, were heads to allow it
    folder = convert(str(source), tmp_path / "orbax", to="orbax", dtype="float32")
    model = abstract(source, "tp=2")
    padded = type(model)(model.cfg, *_padded(model), model.placement, 1, 2)
    restored = restore_parameters(padded, folder)
    assert restored["embedding"].get_value().shape == (98, 64)
    np.testing.assert_array_equal(restored["embedding"].get_value()[96:], 0)


def _padded(model):
    import jax.numpy as jnp
    from flax import nnx

    from jaxllm.models.decoder import Decoder

    return nnx.split(nnx.eval_shape(lambda: Decoder(model.cfg, vocab_padding=2, dtype=jnp.dtype("float32"))))


def test_a_target_that_exists_is_never_overwritten(tiny_model, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    with pytest.raises(ValueError, match="not empty"):
        convert(str(tiny_model("mistral").folder), tmp_path / "out", to="safetensors")


def test_an_orbax_folder_of_another_configuration_is_refused_by_name(tiny_model, tmp_path: Path) -> None:
    folder = convert(str(tiny_model("mistral").folder), tmp_path / "orbax", to="orbax")
    with pytest.raises(ValueError, match=r"parameter layers\.0\.attention\.k_norm"):
        restore_parameters(abstract(tiny_model("qwen3").folder, "tp=1"), folder)


# In a process of its own: when one read fails, Orbax drops the coroutines of the others, and whichever test runs
# when they are collected would be blamed.
_DAMAGE = """
import random, sys, warnings
from pathlib import Path
from jaxllm.config import EngineConfig
from jaxllm.families import read_config
from jaxllm.checkpoints import open_checkpoint
from jaxllm.weights.abstract import make_model
from jaxllm.weights.orbax import restore_parameters
from jaxllm.sharding.mesh import Placement, make_mesh
from jaxllm.sharding.rules import load_rules
warnings.simplefilter("ignore")
folder, count = Path(sys.argv[1]), int(sys.argv[2])
placement = Placement(make_mesh("tp=1"), load_rules("megatron"))
model = make_model(EngineConfig(dtype="float32"), read_config(open_checkpoint(folder).config), placement)
files = sorted(p for p in (folder / "parameters").rglob("*") if p.is_file() and p.stat().st_size)
rng, refused = random.Random(0), 0
for _ in range(count):
    file = rng.choice(files)
    content = file.read_bytes()
    at = rng.randrange(len(content))
    flipped = content[:at] + bytes([content[at] ^ 0x5A]) + content[at + 1 :]
    file.write_bytes(content[:at] if rng.random() < 0.3 else flipped)
    try:
        restore_parameters(model, folder)
    except ValueError as error:
        refused += 1
        assert str(folder) in str(error) and len(str(error).splitlines()) == 1, error
    file.write_bytes(content)
print(refused)
"""


def test_a_damaged_orbax_folder_gives_one_clear_error_and_never_a_crash(tiny_model, tmp_path: Path) -> None:
    folder = convert(str(tiny_model("mistral").folder), tmp_path / "orbax", to="orbax", dtype="float32")
    command = [sys.executable, "-c", _DAMAGE, str(folder), str(NUM_MUTATIONS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=patience(120))
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > NUM_MUTATIONS // 10
