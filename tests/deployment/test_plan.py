"""Plans for TPU slices: real TPU programs of tiny models are compiled; sizes and bounds agree with arithmetic."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from jaxllm.checkpoints import open_checkpoint
from jaxllm.cli import main
from jaxllm.config import EngineConfig
from jaxllm.deployment import plan as planning
from jaxllm.deployment.deployment import bounds, open_deployment
from jaxllm.deployment.plan import make_plan, measure_memory
from jaxllm.deployment.program_text import CompiledProgram
from jaxllm.deployment.search import search
from jaxllm.deployment.topology import open_topology, parse_overflow, parse_topology
from jaxllm.families.presets import model_config
from jaxllm.roofline.bounds import Collective, DeviceWork, lower_bound
from jaxllm.roofline.chips import CHIPS
from jaxllm.weights.convert import convert
from tests.helpers.patience import patience
from tests.helpers.tiny_model import write_tiny_model

pytestmark = pytest.mark.optimized

GIB = 1 << 30
SMALL = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "max_model_len": 256}
SLICES = {"v5e:2x2": 15.75, "v6e:2x2": 31.25, "v5p:2x2x1": 95.74}  # and the GiB their compiler gives a program


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Heads as wide as a TPU's lanes, as in all larger models."""
    folder = tmp_path_factory.mktemp("wide")
    return str(write_tiny_model(folder, num_layers=1, head_dim=128, hidden_size=128))


def refusal(call, *args) -> str:
    with pytest.raises(ValueError) as error:
        call(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("", "v5e:2x4"),
        ("v5e", "v5e:2x4"),
        ("v9:2x2", "v9:2x2"),
        ("v5e:4x4x4", "2 sizes"),
        ("v5p:2x2", "3 sizes"),
        ("v5e:64x64", "256 chips"),
        ("v5e:0x4", "for example"),
    ],
)
def test_topology_that_is_not_one_is_refused_with_an_example(name, named):
    assert named in refusal(parse_topology, name)


def test_slice_that_no_host_has_is_refused():
    assert "v5e:3x3" in refusal(open_topology, "v5e:3x3")


def test_devices_of_half_a_chip_have_half_its_rates():
    assert len(open_topology("v5p:2x2x1").devices) == 4
    half = open_topology("v4:2x2x1")
    assert len(half.devices) == 8
    assert half.chip.flops == CHIPS["v4"].flops / 2 and half.chip.bandwidth == CHIPS["v4"].bandwidth / 2


def test_missing_compiler_is_one_line_that_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["plan", "--model", "llama-3.1-8b", "--topology", "v5e:2x2", "--json"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert 'pip install "jaxllm[plan]"' in err and err.count("error:") == 1


@pytest.mark.parametrize("topology", SLICES)
def test_tiny_model_fits_with_the_figures_that_arithmetic_gives(one_layer, topology):
    config = EngineConfig(model=one_layer, mesh="tp=2", **SMALL)
    plan = make_plan(config, topology)
    spent, cfg = plan["bytes_per_device"], model_config(one_layer)
    assert plan["fits"] and plan["chip"] == topology.partition(":")[0] and plan["num_devices"] == 2
    assert spent["limit"] == pytest.approx(SLICES[topology] * GIB, rel=1e-3)
    norms = 3 * cfg.hidden_size
    expected = (cfg.num_parameters - norms) * 2 / 2 + norms * 4
    assert spent["parameters"] == pytest.approx(expected, rel=0.01)
    token_bytes = cfg.kv_bytes_per_token(2) / 2
    assert spent["kv_pages"] == plan["num_pages"] * 16 * token_bytes
    assert plan["kv_tokens"] == (plan["num_pages"] - 1) * 16
    together = spent["parameters"] + spent["kv_pages"] + spent["temporaries"]
    assert 0 <= 0.92 * spent["limit"] - together < 2 * 16 * token_bytes, "pages take what is left"
    assert plan["kv_cache_memory_bytes"] == plan["num_pages"] * 16 * token_bytes * 2
    none = {"reduce-scatter": 0, "all-to-all": 0, "collective-permute": 0}
    assert plan["collectives"]["prefill"] == none | {"all-reduce": 3, "all-gather": 0}
    assert plan["collectives"]["decode"] == none | {"all-reduce": 3, "all-gather": 1}  # and the logits
    assert set(plan["lower_bound_ms"]) == {"decode", "prefill"} and plan["bound_by"] in plan["terms_ms"]["decode"]


def test_quantised_files_are_planned_as_they_are_kept(one_layer, tmp_path):
    folder = convert(one_layer, tmp_path / "small", to="safetensors", quantize="int4:64")
    deployments = [
        open_deployment(EngineConfig(model=m, mesh="tp=2", **SMALL), "v5e:2x2") for m in (one_layer, str(folder))
    ]
    plain, small = (deployment.model.parameter_bytes_per_device() for deployment in deployments)
    linears = [info.shape for name, info in open_checkpoint(one_layer).tensors.items() if "_proj" in name]
    saved = sum(n * k * (2 - 1 / 2 - 2 / 64) for n, k in linears) / 2
    assert plain - small == pytest.approx(saved, rel=0.01)


def test_model_that_cannot_fit_is_told_so_at_once_with_what_would(capsys):
    args = ["--model", "llama-3.1-70b", "--mesh", "tp=8", "--max-model-len", "8192", "--json"]
    assert main(["plan", "--topology", "v5e:2x4", *args]) == 1
    plan = json.loads(capsys.readouterr().out)
    assert not plan["fits"] and plan["kv_tokens"] == 0
    parameters = model_config("llama-3.1-70b").num_parameters * 2 / 8
    assert plan["bytes_per_device"]["parameters"] == pytest.approx(parameters, rel=0.01)
    assert plan["too_big"]["what"] == "the parameters alone"
    assert plan["too_big"]["bytes_over"] >= parameters - 0.92 * 15.75 * GIB
    assert "--topology v5e:4x4 --mesh tp=16" in plan["would_fit"]


def test_cache_that_was_asked_for_and_is_too_big_does_not_fit(one_layer, monkeypatch):
    monkeypatch.setattr(planning, "compile_programs", lambda deployment, pages: _programs(1000))
    config = EngineConfig(model=one_layer, mesh="tp=2", kv_cache_memory_bytes=40 * GIB, **SMALL)
    plan = make_plan(config, "v5e:2x2")
    assert not plan["fits"]
    over = 20 * GIB - 0.92 * 15.75 * GIB
    assert plan["too_big"]["bytes_over"] == pytest.approx(over, rel=0.01)
    assert make_plan(replace(config, kv_cache_memory_bytes=20 * GIB), "v5e:2x2")["fits"]


def _programs(temporaries: int, layouts: int = 1) -> dict[str, CompiledProgram]:
    one = CompiledProgram(temporaries, 0, 0, 0, [], layouts)
    return {"prefill": one, "decode": one, "sampler": replace(one, temporaries=0)}


def test_temporaries_that_grow_with_the_cache_count_per_page(one_layer, monkeypatch):
    """Two programs show the line: 5000 bytes and 300 for every page."""
    deployment = open_deployment(EngineConfig(model=one_layer, mesh="tp=2", **SMALL), "v5e:2x2")
    monkeypatch.setattr(planning, "compile_programs", lambda d, pages: _programs(5000 + 300 * pages, layouts=2))
    memory = measure_memory(deployment)
    assert memory.per_page == pytest.approx(deployment.page_bytes + 300)
    assert memory.fixed == pytest.approx(5000 + deployment.state_bytes)


@pytest.mark.parametrize(
    ("message", "wanted", "limit"),
    [
        ("total memory required for HLO temporaries (512.00G) exceeds available HBM (15.75G).", 512, 15.75),
        ("Ran out of memory in memory space hbm. Used 20.5G of 31.25G hbm. Exceeded", 20.5, 31.25),
    ],
)
def test_compiler_that_ran_out_of_memory_is_understood(message, wanted, limit):
    assert parse_overflow(message) == (int(wanted * GIB), int(limit * GIB))
    assert parse_overflow("something else") is None


def test_page_table_that_no_kernel_can_look_into_is_refused_with_what_to_change(one_layer, monkeypatch):
    class Lowered:
        def compile(self):
            raise jax.errors.JaxRuntimeError("Ran out of memory in memory space smem. Used 1.00M of 1.00M smem.")

    monkeypatch.setattr("jaxllm.runner.programs.lower", lambda *_: Lowered())
    message = refusal(make_plan, EngineConfig(model=one_layer, mesh="tp=2", **SMALL), "v5e:2x2")
    assert "page table of 4 requests of 16 pages" in message and "--max-model-len, 256 here" in message


@pytest.mark.parametrize(("batch", "published"), {1: 4.98, 8: 12.13, 16: 20.30, 32: 36.65}.items())
def test_decode_bound_of_llama_2_13b_on_eight_v5e_is_the_published_one(batch, published):
    config = EngineConfig(
        model="llama-2-13b", mesh="tp=8", max_num_seqs=batch, max_model_len=8192, max_num_batched_tokens=512
    )
    deployment = open_deployment(config, "v5e:2x4")
    assert "positions" in deployment.notes[0]  # 8k is beyond what that model was trained for
    decode = bounds(deployment, 8192)["decode"]
    assert decode["ms"] == pytest.approx(published, rel=0.01)
    assert decode["bound_by"] == ("weights" if batch == 1 else "KV")


def test_bound_names_its_largest_term():
    chip, none = CHIPS["v5e"], DeviceWork(weight_bytes=0, kv_bytes=0, flops=0)
    assert lower_bound(replace(none, flops=197e9), chip) | {"terms_ms": 0} == {
        "ms": pytest.approx(1.0),
        "bound_by": "FLOPs",
        "terms_ms": 0,
    }
    both = lower_bound(replace(none, kv_bytes=819e6, weight_bytes=2 * 819e6, flops=197e9), chip)
    assert both["ms"] == pytest.approx(3.0) and both["bound_by"] == "weights"
    # A ring over two axes of v5e, both ways: 2 V / (2 * 45 GB/s * 2) for V = 90 MB.
    sent = lower_bound(replace(none, kv_bytes=1, collectives=(Collective("all-reduce", 90_000_000, 16),)), chip)
    assert sent["ms"] == pytest.approx(1.0) and sent["bound_by"] == "interconnect"


def test_search_ranks_what_is_legal_by_its_bound(one_layer):
    found = search(EngineConfig(model=one_layer, **SMALL), "v5e:2x2")
    ranked = found["candidates"]
    assert {"rules": "megatron", "mesh": "tp=4"} in [{"rules": c["sharding_rules"], "mesh": c["mesh"]} for c in ranked]
    fitting = [c["lower_bound_ms"] for c in ranked if c["fits"]]
    assert fitting == sorted(fitting)
    nine_heads = search(EngineConfig(model="smollm2-135m-instruct", **SMALL), "v5e:2x4")["candidates"]
    meshes = {c["mesh"] for c in nine_heads if c["sharding_rules"] == "megatron"}
    assert "dp=8" in meshes and "tp=8" not in meshes, "8 devices cannot share 9 heads"


@pytest.mark.skipif("JAXLLM_FULL_TESTS" not in os.environ, reason="compiles 80 layers: JAXLLM_FULL_TESTS=1")
def test_llama_70b_fits_on_sixteen_v5e():
    command = [sys.executable, "-m", "jaxllm", "plan", "--model", "llama-3.1-70b", "--topology", "v5e:4x4"]
    command += ["--mesh", "tp=16", "--max-num-seqs", "32", "--max-model-len", "8192", "--json"]
    process = subprocess.run(
        command, capture_output=True, text=True, timeout=patience(600), cwd=Path(__file__).parents[2]
    )
    plan = json.loads(process.stdout)
    assert process.returncode == 0 and plan["fits"]
    assert plan["collectives"]["prefill"]["all-reduce"] == 161
    assert plan["compile_seconds"] < 120
