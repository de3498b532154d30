"""Models that come, go, sleep and fail under load: every answer is checked, nothing may be left behind.

`python scripts/pool_soak.py --minutes 30` works on tiny random models that it writes itself (no weights are needed).
`--full-disk FOLDER` names a folder on a small file system of its own (`mount -t tmpfs -o size=512k tmpfs FOLDER`), that
is filled up: compiled programs find no room there, and a model that was being copied there when it became full is
deployed. Prints one JSON object; exit code 1 where an answer was wrong, a byte or page was left, or memory grew by more
than 5% after the first quarter (by then every program has been compiled).
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import gc
import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax

from jaxllm import LLM, Pool, SamplingParams

SIZES = {
    "dtype": "float32",
    "max_model_len": 128,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 32,
    "page_size": 4,
    "kv_cache_memory_bytes": 640 << 10,
}
PROMPTS = ["hello", "the cat sat on", "x" * 40]
PARAMS = [SamplingParams(temperature=t, seed=3, max_tokens=16, ignore_eos=True) for t in (0.0, 0.8)]


MOST_GROWTH = 1.05


def resident_bytes() -> int:
    """Of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def memory() -> dict[str, float]:
    """What there is after a collection of garbage."""
    gc.collect()
    arrays = jax.live_arrays()
    return {
        "resident_bytes": resident_bytes(),
        "arrays": len(arrays),
        "array_bytes": sum(array.nbytes for array in arrays),
        "programs": len(jax.devices()[0].client.live_executables()),
    }


def cut_off(source: Path, folder: Path) -> Path:
    """A model whose copy was broken off by a disk that is full, as it is from now on."""
    copy = folder / "cut-off"
    copy.mkdir()
    for file in sorted(source.iterdir()):
        if file.suffix != ".safetensors":
            (copy / file.name).write_bytes(file.read_bytes())
    weights = (source / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with (folder / "rest").open("wb", buffering=0) as rest:
        try:
            while True:
                rest.write(bytes(4096))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
    return copy


class Soak:
    """One pool and those who trouble it."""

    def __init__(self, folders: dict[str, Path], broken: list[Path], seconds: float):
        self.folders, self.broken = folders, broken
        self.counts: Counter[str] = Counter()
        self.problems: list[str] = []
        self.expected = {name: self._alone(path) for name, path in folders.items()}
        self.pool = Pool({name: str(path) for name, path in folders.items()}, device_memory_bytes=3_200_000, **SIZES)
        for name in folders:
            self.pool.llm(name)
        self.until = time.monotonic() + seconds

    def _alone(self, path: Path) -> list[list[int]]:
        llm = LLM(str(path), **SIZES)
        return [o.outputs[0].token_ids for p in PARAMS for o in llm.generate(PROMPTS, p, use_tqdm=False)]

    def ask(self, rng: random.Random) -> None:
        """Requests whose answers are known."""
        name, which = rng.choice([*self.folders]), rng.randrange(2)
        got = [o.outputs[0].token_ids for o in self.pool.generate(name, PROMPTS, PARAMS[which])]
        if got != self.expected[name][which * len(PROMPTS) : (which + 1) * len(PROMPTS)]:
            self.problems.append(f"{name} gave wrong tokens")

    def leave(self, rng: random.Random) -> None:
        """A client that goes away."""

        async def open_and_leave() -> None:
            llm = await asyncio.wrap_future(self.pool.ready(rng.choice([*self.folders])))
            stream = await llm.open([PROMPTS[0]] * 2, SamplingParams(max_tokens=100, ignore_eos=True))
            await asyncio.sleep(rng.random() * 0.3)
            stream.cancel()

        asyncio.run(open_and_leave())

    def come_and_go(self, rng: random.Random) -> None:
        """A model is deployed, used and undeployed; another one's files are wrong."""
        name = f"guest-{rng.random():.8f}"
        twin = rng.choice([*self.folders])
        self.pool.deploy(name, str(self.folders[twin]))
        got = [o.outputs[0].token_ids for o in self.pool.generate(name, PROMPTS, PARAMS[0])]
        if got != self.expected[twin][: len(PROMPTS)]:
            self.problems.append(f"{name} gave wrong tokens")
        self.pool.undeploy(name).result()
        self.pool.deploy(f"bad-{name}", str(rng.choice(self.broken)))
        try:
            self.pool.generate(f"bad-{name}", "x")
            self.problems.append("a broken model answered")
        except ValueError:
            pass
        self.pool.undeploy(f"bad-{name}").result()

    def sleep(self, rng: random.Random) -> None:
        """A model is sent off the device."""
        self.pool.sleep(rng.choice([*self.folders]), rng.choice((1, 1, 2)))

    def worker(self, seed: int, actions: list[Any]) -> None:
        """One thread of trouble."""
        rng = random.Random(seed)
        while time.monotonic() < self.until and len(self.problems) < 10:
            action = rng.choice(actions)
            try:
                action(rng)
            except Exception as error:
                self.problems.append(f"{action.__name__}: {type(error).__name__}: {error}")
            self.counts[action.__name__] += 1

    def run(self) -> dict[str, Any]:
        """All of it, and what was left."""
        troubles = [[self.ask], [self.ask, self.leave], [self.leave, self.sleep], [self.come_and_go, self.ask]]
        threads = [threading.Thread(target=self.worker, args=(i, actions)) for i, actions in enumerate(troubles)]
        for thread in threads:
            thread.start()
        began, samples = time.monotonic(), []
        while any(thread.is_alive() for thread in threads):
            time.sleep(1)
            if time.monotonic() - began > 0.25 * (len(samples) + 1) * (self.until - began):
                samples.append(memory() | {"minutes": (time.monotonic() - began) / 60})
                print(json.dumps(samples[-1]), file=sys.stderr, flush=True)
        deadline = time.monotonic() + 10
        while any(model.open for model in self.pool.models) and time.monotonic() < deadline:
            time.sleep(0.05)
        self._check()
        if samples[-1]["resident_bytes"] > MOST_GROWTH * samples[0]["resident_bytes"]:
            self.problems.append("memory grew")
        totals = self.pool.residents.totals
        self.pool.close()
        return {
            "actions": dict(self.counts),
            "switches": totals.count,
            "wasted_prefetches": totals.wasted_prefetches,
            "cache_bytes_moved": totals.cache_bytes,
            "memory": samples,
            "peak_device_bytes": self.pool.residents.budget.peak,
            "problems": self.problems,
        }

    def _check(self) -> None:
        try:
            self.pool.host_kv.slabs.check()
            for model in self.pool.models:
                assert not model.open and model.llm is not None, f"{model.name} has requests left"
                model.llm.engine.pool.check([])  # type: ignore[union-attr]
        except AssertionError as error:
            self.problems.append(str(error))


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--full-disk", type=Path, metavar="FOLDER", help="on a small file system; see above")
    args = parser.parse_args()
    if args.full_disk is not None:
        jax.config.update("jax_compilation_cache_dir", str(args.full_disk))
    from tests.helpers.tiny_model import write_tiny_model

    with tempfile.TemporaryDirectory() as folder:
        families = {"llama": "Llama", "qwen": "Qwen3", "mistral": "Mistral", "olmo": "Olmo2"}
        paths = {name: write_tiny_model(Path(folder) / name, family=f, hidden_size=32) for name, f in families.items()}
        broken = Path(folder) / "broken"
        broken.mkdir()
        (broken / "config.json").write_text("{}")
        bad = [broken] if args.full_disk is None else [broken, cut_off(paths["llama"], args.full_disk)]
        report = Soak(paths, bad, 60 * args.minutes).run()
    print(json.dumps(report, indent=1))
    return 1 if report["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
