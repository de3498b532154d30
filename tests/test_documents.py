"""What the documents show is what the code makes, and the files they name exist."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_picture_is_drawn_from_its_text():
    spec = importlib.util.spec_from_file_location("draw_flow", ROOT / "scripts" / "draw_flow.py")
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["draw_flow"] = script
    spec.loader.exec_module(script)
    drawn = script.draw()
    assert drawn == (ROOT / "docs" / "flow.svg").read_text(encoding="utf-8")
    for room in re.findall(r'class="room"[^>]*>([^<]+)/?<', drawn):
        assert (ROOT / "jaxllm" / room.strip().rstrip("/")).is_dir(), room


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_a_document_names_exist(document):
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (document.parent / target).exists(), target
    folders = "|".join(path.name for path in (ROOT / "jaxllm").iterdir() if path.is_dir() and path.name[0] != "_")
    for name in re.findall(rf"`(?:jaxllm/)?((?:{folders})/[\w/]+\.\w+)`", text):
        assert (ROOT / "jaxllm" / name).exists() or (ROOT / name).exists(), name


def test_every_room_is_in_the_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rooms = {path.name for path in (ROOT / "jaxllm").iterdir() if (path / "__init__.py").exists()}
    assert rooms == set(re.findall(r"^  (\w+)/ +\S", text, flags=re.M))
