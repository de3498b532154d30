"""Two engines on disjoint devices of one process."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxllm.deployment.topology import open_topology
from jaxllm.sharding.mesh import make_mesh
from tests.helpers.patience import patience

ROOT = Path(__file__).parents[2]
# Alone on the first devices; then both side by side, with a cache on disk that is warm the second time.
CODE = """
import json, sys
from jaxllm import LLM, SamplingParams
settings = dict(model=sys.argv[1], max_model_len=64, kv_cache_memory_bytes=1 << 20, max_num_seqs=4,
                max_num_batched_tokens=64, dtype="float32", use_tqdm=False)
params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
engines = [LLM(mesh="tp=2", **settings), LLM(mesh="tp=2", device_offset=2, **settings)]
params_at = [sorted(d.id for d in engine.engine.runner.state.params[0].devices()) for engine in engines]
tokens = [[list(out.outputs[0].token_ids) for out in llm.generate(["hello", "a b c"], params)] for llm in engines]
print(json.dumps([params_at, tokens]))
"""


def test_mesh_with_an_offset_leaves_the_first_devices_alone():
    assert [d.id for d in make_mesh("tp=2", offset=3).devices.flat] == [d.id for d in jax.devices()[3:5]]
    with pytest.raises(ValueError, match=r"needs 4 devices from number 6 on but there are 8"):
        make_mesh("tp=4", offset=6)


@pytest.mark.parametrize(("mesh", "offset"), [("tp=16", 0), ("tp=8", 0), ("tp=8", 8), ("tp=4", 4)])
def test_neighbours_on_a_mesh_axis_are_neighbours_on_the_torus(mesh, offset):
    devices = list(open_topology("v5e:4x4").devices)
    ring = [d.coords for d in make_mesh(mesh, devices, offset=offset).devices.flat]
    assert len(set(map(tuple, ring))) == len(ring)
    hops = [sum(abs(a - b) for a, b in zip(x, y, strict=True)) for x, y in itertools.pairwise(ring)]
    assert sum(hops) <= len(hops) + 1, "one detour at most"


def test_two_engines_side_by_side_say_what_one_says_alone_also_from_a_warm_cache(tiny_llama, tmp_path):
    """In a process of its own: a warm cache on a mesh without device 0 has been reported to crash JAX."""
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "xla"), "JAX_NUM_CPU_DEVICES": "4"}
    outputs = []
    for _ in range(2):
        process = subprocess.run(
            [sys.executable, "-c", CODE, str(tiny_llama)],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=patience(180),
        )
        assert process.returncode == 0, process.stderr
        outputs.append(json.loads(process.stdout))
    assert any((tmp_path / "xla").iterdir()), "the second run read what the first compiled"
    (places, (first, second)), again = outputs
    assert places == [[0, 1], [2, 3]]
    assert first == second and len(set(map(tuple, first))) == 2
    assert again == [places, [first, second]]
