"""What may import what, how little an import loads, and that an installed wheel is whole."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "jaxllm"
ARRAYS = {"jax", "jaxlib", "flax", "numpy", "ml_dtypes"}


def python(code: str, *, cwd: Path = ROOT, **environment: str) -> str:
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=120
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.mark.parametrize(
    "module",
    ["jaxllm", "jaxllm.cli", "jaxllm.scheduling.scheduler", "jaxllm.scheduling.page_pool", "jaxllm.scheduling.request",
     "jaxllm.config.sampling", "jaxllm.sharding.rules", "jaxllm.checkpoints", "jaxllm.tokenizer"],
)  # fmt: skip
def test_import_loads_no_array_library(module):
    loaded = python(f"import sys, {module}; print(*{{name.partition('.')[0] for name in sys.modules}})").split()
    assert module.partition(".")[0] in loaded
    assert not ARRAYS & set(loaded)


def test_every_public_name_is_found_and_others_are_refused():
    import jaxllm

    for name in jaxllm.__all__:
        assert getattr(jaxllm, name).__name__ == name
    with pytest.raises(AttributeError, match="'jaxllm' has no attribute 'LMM'"):
        _ = jaxllm.LMM


def imports(file: Path) -> set[str]:
    """Modules that a file imports anywhere, those only for annotations left out."""

    def walk(node: ast.AST) -> set[str]:
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            return set().union(*map(walk, node.orelse), set())
        found: set[str] = set().union(*map(walk, ast.iter_child_nodes(node)), set())
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        return found

    return walk(ast.parse(file.read_text(encoding="utf-8")))


def test_imports_are_seen_wherever_they_stand(tmp_path):
    (tmp_path / "a.py").write_text(
        "import jax.numpy as jnp\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import numpy\n"
        "def f():\n    from jaxllm.engine import llm\n"
    )
    assert imports(tmp_path / "a.py") == {"jax.numpy", "typing.TYPE_CHECKING", "jaxllm.engine.llm"}


ENGINE, MODELS = "jaxllm.engine", "jaxllm.models"
FORBIDDEN = {
    "config": {"jax", "flax", "numpy", ENGINE},
    "scheduling": {*ARRAYS, ENGINE, "jaxllm.runner", "jaxllm.kv"},
    "engine/outputs.py": ARRAYS,
    "models": {ENGINE, "jaxllm.runner", "jaxllm.scheduling", "jaxllm.cli"},
    "families": {ENGINE, "jaxllm.runner", "jaxllm.scheduling", "jaxllm.weights", "jaxllm.cli"},
    "kv": {ENGINE, MODELS, "jaxllm.cli"},
    "sharding/rules.py": {*ARRAYS, ENGINE, MODELS},
    "sharding/mesh.py": {ENGINE, MODELS},
    "ops": {ENGINE, MODELS, "jaxllm.sharding", "jaxllm.checkpoints", "jaxllm.tokenizer", "jaxllm.cli"},
    "checkpoints": {"jax", "flax", ENGINE, MODELS, "jaxllm.sharding", "jaxllm.cli"},
    "tokenizer": {"jax", "flax", "numpy", ENGINE, MODELS, "jaxllm.sharding", "jaxllm.cli"},
    "runner": {ENGINE, "jaxllm.bench", "jaxllm.server", "jaxllm.commands", "jaxllm.cli"},
    "engine": {"jaxllm.cli", "jaxllm.bench", "jaxllm.server", "jaxllm.commands"},
}


@pytest.mark.parametrize("part", FORBIDDEN)
def test_dependencies_point_one_way(part):
    path = PACKAGE / part
    files = [path] if path.suffix else sorted(path.rglob("*.py"))
    assert files
    for file in files:
        found = {m for m in imports(file) for f in FORBIDDEN[part] if m == f or m.startswith(f"{f}.")}
        assert not found, f"{file.relative_to(ROOT)} imports {found}"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("hatchling") is None:
        pytest.fail("hatchling is needed to build the wheel: pip install -e '.[test]'")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    (file,) = folder.glob("jaxllm-*.whl")
    return file


def test_wheel_contains_every_module_and_rule_file_and_nothing_else(wheel):
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    modules = {str(file.relative_to(ROOT)) for file in PACKAGE.rglob("*.py")}
    rules = {f"jaxllm/sharding/_rules/{file.name}" for file in (ROOT / "sharding_rules").glob("*.toml")}
    assert "jaxllm/sharding/_rules/megatron.toml" in rules
    page = {str(file.relative_to(ROOT)) for file in (PACKAGE / "server" / "page").rglob("*") if file.is_file()}
    assert {"jaxllm/server/page/index.html", "jaxllm/server/page/vendor/marked.LICENSE"} <= page
    assert {n for n in names if not n.endswith("/py.typed")} == modules | rules | page


def test_installed_wheel_finds_its_rules_far_from_the_checkout(wheel, tmp_path):
    target, elsewhere = tmp_path / "target", tmp_path / "elsewhere"
    elsewhere.mkdir()
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", "--target", str(target)]
    environment = os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_ROOT_USER_ACTION": "ignore"}
    process = subprocess.run([*command, str(wheel)], env=environment, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    code = (
        "import json, sys\n"
        f"sys.path[:] = [p for p in sys.path if p != {str(ROOT)!r}]\n"
        "import jaxllm\n"
        "from jaxllm.sharding.rules import load_rules, rules_folder\n"
        "names = ['megatron', 'column_only', 'replicated']\n"
        "cuts = {name: load_rules(name).parameters.get('ffn') for name in names}\n"
        "print(json.dumps([jaxllm.__file__, str(rules_folder()), cuts, sys.path]))\n"
    )
    module, folder, cuts, path = json.loads(python(code, cwd=elsewhere, PYTHONPATH=str(target)))
    assert Path(module).is_relative_to(target)
    assert Path(folder).is_relative_to(target)
    assert cuts == {"megatron": "tp", "column_only": "tp", "replicated": None}
    assert str(ROOT) not in path


def test_installed_script_is_the_command_line(wheel):
    archive = zipfile.ZipFile(wheel)
    (entry_points,) = [name for name in archive.namelist() if name.endswith("/entry_points.txt")]
    assert "jaxllm = jaxllm.cli:entry" in archive.read(entry_points).decode()
