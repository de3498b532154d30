"""Who imports whom, annotations and imports inside functions included: files in, arrows and circles out."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

Graph = Mapping[str, set[str]]


def import_graph(package: Path) -> dict[str, set[str]]:
    """Every module of a package with the modules of it that it imports anywhere."""
    names = {_name(package, file): file for file in package.rglob("*.py")}
    return {name: set(_imports(file, names)) - {name} for name, file in names.items()}


def _name(package: Path, file: Path) -> str:
    parts = (package.name, *file.relative_to(package).with_suffix("").parts)
    return ".".join(parts).removesuffix(".__init__")


def _imports(file: Path, names: Mapping[str, Path]) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield from (name for name in (whole if whole in names else node.module,) if name in names)


def circles(graph: Graph) -> list[list[str]]:
    """Groups of modules each of which reaches every other: strongly connected components of more than one."""
    reached = {name: _reached(graph, name) for name in graph}
    groups, seen = [], set()
    for name in graph:
        group = {other for other in reached[name] if name in reached[other]}
        if group and name not in seen:
            groups.append(sorted(group))
            seen |= group
    return groups


def _reached(graph: Graph, start: str) -> set[str]:
    found: set[str] = set()
    todo = [start]
    while todo:
        for name in graph[todo.pop()]:
            if name not in found:
                found.add(name)
                todo.append(name)
    return found


def room(module: str) -> str:
    """The folder (or file) below the package that a module belongs to; the package itself has none."""
    return module.split(".")[1] if "." in module else ""
