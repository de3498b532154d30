"""The disk store: what is written comes back whole or not at all, whatever happens to process or file."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxllm.kv.disk_store import DiskStore, PageFormat, decode, encode
from tests.kv import pages_of_keys

LAYOUT = PageFormat("model", (((2, 2, 4, 1, 8), "float32"), ((2, 2, 4), "bfloat16")))
# Forks a writer for every line it reads: starting Python takes longer than all a writer does before it is killed.
WRITERS = """
import itertools, os, sys
from pathlib import Path
from tests.kv.pages_of_keys import LAYOUT, key_of, page_of
from jaxllm.kv.disk_store import DiskStore
for line in sys.stdin:
    folder, start = line.split()
    pid = os.fork()
    if not pid:
        store = DiskStore(Path(folder), 60_000, LAYOUT)
        print(os.getpid(), flush=True)
        for i in itertools.count(int(start)):
            store.write(key_of(i), page_of(i))
    os.waitpid(pid, 0)
    print("dead", flush=True)
"""


def page(seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype(name) for shape, name in LAYOUT.arrays]


def same(a: list[np.ndarray] | None, b: list[np.ndarray]) -> bool:
    return a is not None and all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_pages_survive_the_process_that_wrote_them(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, 10**6, LAYOUT)
    assert store.write(b"one", page(1)) and store.write(b"two", page(2))
    again = DiskStore(tmp_path, 10**6, LAYOUT)
    assert len(again) == 2
    assert same(again.read(b"one"), page(1)) and same(again.read(b"two"), page(2))
    assert again.read(b"three") is None
    assert again.num_bytes == sum(f.stat().st_size for f in tmp_path.iterdir())


def test_the_folder_never_exceeds_its_bound_and_the_oldest_goes_first(tmp_path: Path) -> None:
    size = len(encode(LAYOUT.header(b"00"), page(0)))
    store = DiskStore(tmp_path, 3 * size, LAYOUT)
    for i in range(3):
        store.write(b"%02d" % i, page(i))
    store.read(b"00")
    store.write(b"03", page(3))
    assert [key in store for key in (b"00", b"01", b"02", b"03")] == [True, False, True, True]
    assert sum(f.stat().st_size for f in tmp_path.iterdir()) == store.num_bytes == 3 * size
    assert len(DiskStore(tmp_path, size, LAYOUT)) == 1, "a smaller bound holds from the start"
    assert not DiskStore(tmp_path, 10, LAYOUT).write(b"09", page(9))


def test_any_flipped_byte_is_a_miss(tmp_path: Path) -> None:
    whole = encode(LAYOUT.header(b"k"), page(1))
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        assert decode(bytes(damaged), LAYOUT.header(b"k")) is None, f"byte {at}"
    store = DiskStore(tmp_path, 10**6, LAYOUT)
    store.write(b"k", page(1))
    (file,) = tmp_path.iterdir()
    file.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    assert store.read(b"k") is None
    assert store.num_damaged == 1
    assert b"k" not in store
    assert not file.exists()


@pytest.mark.parametrize("cut", [0, 1, 40, -1])
def test_a_file_that_was_cut_short_is_a_miss(tmp_path: Path, cut: int) -> None:
    store = DiskStore(tmp_path, 10**6, LAYOUT)
    store.write(b"k", page(1))
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:cut])
    assert DiskStore(tmp_path, 10**6, LAYOUT).read(b"k") is None


def test_a_page_of_another_model_shape_or_key_is_a_miss(tmp_path: Path) -> None:
    DiskStore(tmp_path, 10**6, LAYOUT).write(b"k", page(1))
    others = [
        PageFormat("other", LAYOUT.arrays),
        PageFormat("model", LAYOUT.arrays[:1]),
        PageFormat("model", (((2, 2, 4, 2, 4), "float32"), LAYOUT.arrays[1])),
    ]
    for layout in others:
        folder = tmp_path / str(others.index(layout))
        folder.mkdir()
        (folder / f"{b'k'.hex()}.kvpage").write_bytes((tmp_path / f"{b'k'.hex()}.kvpage").read_bytes())
        assert DiskStore(folder, 10**6, layout).read(b"k") is None
    (tmp_path / f"{b'x'.hex()}.kvpage").write_bytes((tmp_path / f"{b'k'.hex()}.kvpage").read_bytes())
    assert DiskStore(tmp_path, 10**6, LAYOUT).read(b"x") is None, "a page under another's name"


def test_a_page_that_another_process_evicted_is_a_miss(tmp_path: Path) -> None:
    ours, theirs = DiskStore(tmp_path, 10**6, LAYOUT), DiskStore(tmp_path, 10**6, LAYOUT)
    ours.write(b"k", page(1))
    next(tmp_path.iterdir()).unlink()
    assert ours.read(b"k") is None
    assert ours.num_bytes == 0
    assert theirs.read(b"k") is None


def test_a_folder_that_cannot_be_made_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="give another disk_kv_path"):
        DiskStore(tmp_path / "file", 10**6, LAYOUT)


def test_killed_at_any_moment_it_comes_back_without_a_wrong_page(tmp_path: Path) -> None:
    rng, found, torn = random.Random(0), 0, 0
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(
        [sys.executable, "-c", WRITERS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
    ) as writers:
        assert writers.stdin is not None and writers.stdout is not None
        for round_ in range(50):
            folder, first = tmp_path / f"{round_ % 5}", 1000 * (round_ // 5)
            before = set(folder.glob("*"))
            print(folder, first, file=writers.stdin, flush=True)
            pid = int(writers.stdout.readline())
            while set(folder.glob("*")) == before:  # it has begun, however busy this machine is
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.03))
            os.kill(pid, signal.SIGKILL)
            assert writers.stdout.readline() == "dead\n"
            torn += len(list(folder.glob("*.tmp")))
            store = DiskStore(folder, 60_000, pages_of_keys.LAYOUT)
            assert not list(folder.glob("*.tmp")), "what was half written is cleared away"
            assert sum(f.stat().st_size for f in folder.iterdir()) == store.num_bytes <= 60_000
            for i in range(10_000):
                if (key := pages_of_keys.key_of(i)) in store:
                    assert same(store.read(key), pages_of_keys.page_of(i))
                    found += 1
            assert store.num_damaged == 0
    assert found > 50, "the writers were killed before they wrote anything"
    assert torn > 0, "no writer was killed while it wrote"
