"""`scripts/gpu_check.py` runs from end to end on a CPU, and its engine needs no package beyond JAX and Flax."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.helpers.patience import patience

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "gpu_check.py"
FULL = os.environ.get("JAXLLM_FULL_TESTS") == "1"

WITHOUT_PACKAGES = """
import runpy, sys

class Refuse:
    names = {"tokenizers", "jinja2", "gguf", "huggingface_hub", "orbax", "tqdm", "safetensors", "torch", "transformers"}
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            raise ImportError(f"{name} is not there")

sys.meta_path.insert(0, Refuse())
sys.argv = [SCRIPT, "--part", "engine", "--tiny"]
runpy.run_path(SCRIPT, run_name="__main__")
"""


def test_engine_part_runs_where_nothing_but_jax_and_flax_is_installed():
    code = f"SCRIPT = {str(SCRIPT)!r}\n{WITHOUT_PACKAGES}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=patience(300))
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["phase"] for row in rows] == ["decode", "decode", "prefill"]
    assert all(row["ms"] > 0 and row["flops_per_s"] > 0 for row in rows)


def test_parts_write_one_report_and_a_part_out_of_time_is_skipped_and_said(tmp_path):
    parts = (
        ["ceilings", "kernels", "attention", "engine", "engine8", "engine4", "products", "peer"]
        if FULL
        else ["ceilings", "kernels"]
    )
    command = [sys.executable, str(SCRIPT), "--tiny", "--out", str(tmp_path), "--budget", "300", "--parts", *parts]
    done = subprocess.run(command, capture_output=True, text=True, timeout=patience(1500))
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    assert list(report["parts"]) == parts
    assert all(part["rows"] and "note" not in part for part in report["parts"].values()), report
    assert report["parts"]["kernels"]["rows"][0]["ok"]
    assert "worst error" in (tmp_path / "gpu_check.md").read_text()

    command = [sys.executable, str(SCRIPT), "--tiny", "--out", str(tmp_path), "--budget", "0.2", "--parts", "peer"]
    subprocess.run(command, capture_output=True, timeout=patience(300))
    assert "* peer: stopped after its 0.2 s" in (tmp_path / "gpu_check.md").read_text()
