"""Requests in files: over HTTP with the official client, and from the command line."""

from __future__ import annotations

import json

from jaxllm.cli import main
from tests.server.live import ENGINE, wait_until

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def line(custom_id: str, url: str, body: dict, **fields) -> str:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body} | fields)


def test_a_batch_answers_every_line_or_says_what_is_wrong_with_it(client):
    body = {"prompt": "hello", "max_tokens": 3, "temperature": 0}
    lines = [line("a", TEXT, body), line("b", TEXT, body | {"max_tokens": -1}), line("c", CHAT, {}), "{no json", ""]
    file = client.files.create(file=("in.jsonl", "\n".join(lines).encode()), purpose="batch")
    assert client.files.retrieve(file.id).bytes == len("\n".join(lines)) and file.id in {
        f.id for f in client.files.list()
    }
    made = client.batches.create(input_file_id=file.id, endpoint=TEXT, completion_window="24h")
    wait_until(lambda: client.batches.retrieve(made.id).status == "completed", 30)
    done = client.batches.retrieve(made.id)
    assert (done.request_counts.completed, done.request_counts.failed, done.request_counts.total) == (1, 3, 4)
    (good,) = [json.loads(one) for one in client.files.content(done.output_file_id).text.splitlines()]
    alone = client.completions.create(model="tiny", **body)
    assert good["custom_id"] == "a" and good["response"]["body"]["choices"][0]["text"] == alone.choices[0].text
    bad = [json.loads(one) for one in client.files.content(done.error_file_id).text.splitlines()]
    assert [one["custom_id"] for one in bad] == ["b", "c", None]
    assert "max_tokens is -1" in bad[0]["error"]["message"] and "expected /v1/completions" in bad[1]["error"]["message"]
    assert client.files.delete(file.id).deleted
    assert client.batches.cancel(made.id).status == "completed"


def test_the_command_writes_answers_in_the_order_of_the_input(tiny_model, tmp_path, capsys):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    talk = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    lines = [
        line(str(n), CHAT if n % 2 else TEXT, talk if n % 2 else {"prompt": "x", "max_tokens": 2}) for n in range(6)
    ]
    source.write_text("\n".join(lines))
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in ENGINE.items()]
    assert main(["run-batch", "-i", str(source), "-o", str(target), f"--model={tiny_model}", *flags]) == 0
    answers = [json.loads(one) for one in target.read_text().splitlines()]
    assert [one["custom_id"] for one in answers] == [str(n) for n in range(6)]
    assert all(one["response"]["status_code"] == 200 and one["error"] is None for one in answers)
    assert "6 of 6" in capsys.readouterr().err
