"""How a server is reached, and how long it works for one request."""

from __future__ import annotations

import json
import ssl
import time
from pathlib import Path

import httpx
import pytest
import trustme

from tests.helpers.patience import patience
from tests.server.live import KEY, serving, wait_until

HEADERS = {"authorization": f"Bearer {KEY}"}
BODY = {"model": "tiny", "prompt": "abc", "max_tokens": 4, "temperature": 0}


def healthy(client: httpx.Client) -> bool:
    try:
        return client.get("/health").status_code == 200
    except httpx.ConnectError:
        return False


def test_unix_socket_answers_as_a_port_does(tiny_model: Path, tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with (
        serving(tiny_model, listen={"uds": path}),
        httpx.Client(transport=httpx.HTTPTransport(uds=path), base_url="http://jaxllm", headers=HEADERS) as client,
    ):
        wait_until(lambda: healthy(client), 60)
        assert client.post("/v1/completions", json=BODY, timeout=patience(60)).json()["usage"]["completion_tokens"] == 4


def test_tls_serves_the_given_certificate_and_nothing_in_the_clear(tiny_model: Path, tmp_path: Path) -> None:
    authority = trustme.CA()
    identity = authority.issue_cert("127.0.0.1")
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    identity.private_key_pem.write_to_path(str(key))
    for blob in identity.cert_chain_pems:
        blob.write_to_path(str(cert), append=True)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    with (
        serving(tiny_model, listen={"ssl_keyfile": str(key), "ssl_certfile": str(cert)}) as live,
        httpx.Client(verify=trusting, base_url=live.url, headers=HEADERS) as client,
    ):
        wait_until(lambda: healthy(client), 60)
        assert client.post("/v1/completions", json=BODY, timeout=patience(60)).status_code == 200
        with pytest.raises(httpx.ConnectError, match=r"(?i)certificate"):
            httpx.get(f"{live.url}/health")
        with pytest.raises(httpx.TransportError):
            httpx.get(live.url.replace("https", "http") + "/health")


@pytest.mark.parametrize("stream", [False, True])
def test_request_that_takes_too_long_ends_with_an_error_and_frees_its_pages(tiny_model: Path, stream: bool) -> None:
    slow = {"before_step": lambda: time.sleep(0.02), "max_decode_steps": 1}
    with serving(tiny_model, settings={"request_timeout": 0.5}, **slow) as live:
        body = BODY | {"max_tokens": 400, "ignore_eos": True, "stream": stream}
        answer = httpx.post(f"{live.url}/v1/completions", json=body, headers=HEADERS, timeout=patience(60))
        if stream:
            events = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
            assert events[-1] == "[DONE]" and json.loads(events[-2])["error"]["code"] == "timeout"
        else:
            assert answer.status_code == 503 and answer.json()["error"]["code"] == "timeout"
