"""One tiny model and one server for most tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs the extra 'server'")
pytest.importorskip("openai", reason="needs the extra 'test'")

from tests.helpers.patience import patience
from tests.helpers.tiny_llama import write_tiny_llama
from tests.server.live import KEY, Live, serving


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def live(tiny_model: Path) -> Iterator[Live]:
    with serving(tiny_model) as running:
        yield running


@pytest.fixture
def client(live: Live):
    import openai

    with openai.OpenAI(base_url=f"{live.url}/v1", api_key=KEY, max_retries=0, timeout=patience(60)) as made:
        yield made


@pytest.fixture
def http(live: Live):
    import httpx

    headers = {"authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=live.url, headers=headers, timeout=patience(60)) as made:
        yield made
