"""Eight emulated CPU devices for every test, and the fixtures that tests share."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
# One persistent cache per user: reruns skip most compilation, and no test writes into the user's own cache.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / f"jaxllm-test-xla-{os.getuid()}"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")
# Most time of most tests is XLA's. Plain code is compiled in a little over half of it, and decides the same tokens.
FULL = bool(os.environ.get("JAXLLM_FULL_TESTS"))
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "0" if FULL else "1")
_END = float(os.environ.get("JAXLLM_TESTS_END", "inf"))  # seconds since the epoch; set where a run must end in time


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with few and long tests first, so that processes that share the work end together."""
    long = ("sharding", "deployment", "runner", "engine", "bench")
    items.sort(key=lambda item: not any(name in item.path.parts for name in long))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Choose how the compiler works before any fixture of the test compiles something."""
    if time.time() > _END:
        pytest.skip("JAXLLM_TESTS_END has come: no time is left for this test")
    if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "0":
        return
    import jax

    plain = not any(item.get_closest_marker(name) for name in ("optimized", "real_model"))
    if jax.config.read("jax_disable_most_optimizations") != plain:
        jax.clear_caches()  # what was compiled the other way
        jax.config.update("jax_disable_most_optimizations", plain)


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The real SmolLM2-135M-Instruct weights; fetched once into the user's cache."""
    from jaxllm.checkpoints import pull

    return pull("smollm2-135m-instruct", progress=False)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a two-layer random Llama and a byte tokenizer."""
    from tests.helpers.tiny_model import write_tiny_model

    return write_tiny_model(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any]]:
    """`saved_model(name)`: the folder of one of `gguf_models.MODELS` and the model, made on first use."""

    @cache
    def make(name: str) -> tuple[Path, Any]:
        from tests.helpers.gguf_models import save_model

        folder = tmp_path_factory.mktemp(name)
        return folder, save_model(name, folder)

    return make
