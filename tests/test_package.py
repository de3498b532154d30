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

from tests.helpers.import_graph import circles, import_graph, room
from tests.helpers.patience import patience

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "jaxllm"
LIMIT = patience(120)
ARRAYS = {"jax", "jaxlib", "flax", "numpy", "ml_dtypes"}


def python(code: str, *, cwd: Path = ROOT, **environment: str) -> str:
    process = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=patience(120),
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.mark.parametrize(
    "module",
    [
        "jaxllm",
        "jaxllm.cli",
        "jaxllm.scheduling.scheduler",
        "jaxllm.scheduling.page_pool",
        "jaxllm.scheduling.request",
        "jaxllm.config.sampling",
        "jaxllm.sharding.rules",
        "jaxllm.checkpoints",
        "jaxllm.tokenizer",
    ],
)
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


# Each room may import the rooms after it, and nothing before it: what a reader of one room has to know is below.
ROOMS = (
    "cli commands server schema simulation bench deployment pool training entrypoints disaggregation decoding "
    "engine runner telemetry weights adapters parsing kv constraints scheduling models families ops sharding "
    "roofline tokenizer checkpoints config version"
).split()
GRAPH = import_graph(PACKAGE)
# Rooms that decide, read files or describe: without what they do not need, they start fast and run anywhere.
WITHOUT = {
    "scheduling": ARRAYS,
    "decoding": ARRAYS,
    "config": ARRAYS,
    "checkpoints": {"jax", "jaxlib", "flax"},
    "pool/policies.py": ARRAYS,
    "pool/prefill_groups.py": ARRAYS,
    "pool/decode_rounds.py": ARRAYS,
    "tokenizer": ARRAYS,
    "telemetry/figures.py": ARRAYS,
    "sharding/rules.py": ARRAYS,
    "engine/outputs.py": ARRAYS,
}


def test_every_folder_is_a_room_with_a_floor():
    found = {file.stem if file.suffix else file.name for file in PACKAGE.iterdir() if not file.name.startswith("_")}
    assert found - {"py.typed", "py"} <= set(ROOMS)


def test_rooms_import_only_rooms_below_them():
    floors = {name: floor for floor, name in enumerate(ROOMS)}
    upward = [
        f"{module} imports {other}"
        for module, others in GRAPH.items()
        for other in others
        if room(module) in floors and room(other) in floors and floors[room(other)] < floors[room(module)]
    ]
    assert not upward


def test_no_circle_of_imports():
    assert circles(GRAPH) == []


def test_a_planted_circle_and_hidden_imports_are_found(tmp_path):
    package = tmp_path / "house"
    package.mkdir()
    for name, text in {
        "__init__": "",
        "low": "import numpy\n",
        "high": "from house import low\n",
        "left": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from house.right import R\n",
        "right": "def f():\n    import house.left\n",
    }.items():
        (package / f"{name}.py").write_text(text)
    graph = import_graph(package)
    assert graph["house.high"] == {"house.low"} and circles(graph) == [["house.left", "house.right"]]


@pytest.mark.parametrize("part", WITHOUT)
def test_rooms_do_without_array_libraries(part):
    path = PACKAGE / part
    for file in [path] if path.suffix else sorted(path.rglob("*.py")):
        loaded = {name.partition(".")[0] for name in _loaded(ast.parse(file.read_text(encoding="utf-8")))}
        assert not loaded & WITHOUT[part], file


def _loaded(node: ast.AST) -> set[str]:
    """What an import or a call loads; annotations load nothing."""
    if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
        return set().union(*map(_loaded, node.orelse), set())
    found = set().union(*map(_loaded, ast.iter_child_nodes(node)), set())
    if isinstance(node, ast.Import):
        found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and node.module:
        found.add(node.module)
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("hatchling") is None:
        pytest.fail("hatchling is needed to build the wheel: pip install -e '.[test]'")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT)
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
    process = subprocess.run([*command, str(wheel)], env=environment, capture_output=True, text=True, timeout=LIMIT)
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
