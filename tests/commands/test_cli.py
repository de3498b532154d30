"""The command line: what goes to which stream, exit codes, and one line for everything a user can get wrong.

Processes are started only where the process matters (module entry, streams, devices, signals); the rest calls
`main` here, which is much faster.
"""

from __future__ import annotations

import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from jaxllm.cli import main
from tests.helpers.patience import patience
from tests.helpers.tiny_model import write_tiny_model

SMALL = ["--max-model-len", "96", "--kv-cache-memory-bytes", "1000000", "--max-num-seqs", "4"]
SMALL += ["--max-num-batched-tokens", "64"]
ERROR = re.compile(r"jaxllm: error: [^\n]+\n")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def jaxllm(tiny: Path, capsys: pytest.CaptureFixture[str]):
    """Run a command on the tiny model in this process: exit code, standard output, standard error."""

    def run(command: str, *args: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([command, *args, "--model", str(tiny), *SMALL])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def start(*args: str, **kwargs) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-m", "jaxllm", *args], stdout=subprocess.PIPE, text=True, **kwargs)


def test_json_holds_one_entry_per_prompt_in_order_and_nothing_else_is_printed(jaxllm, tiny):
    prompts = ["hello", "a", "the third prompt"]
    code, out, err = jaxllm("generate", *prompts, "--max-tokens", "5", "--ignore-eos", "--json")
    assert (code, err) == (0, "")
    answer = json.loads(out)
    assert answer["model"] == str(tiny)
    assert set(answer) >= {"model", "outputs", "metrics"}
    assert [entry["prompt"] for entry in answer["outputs"]] == prompts
    for entry in answer["outputs"]:
        assert set(entry) >= {"prompt", "text", "token_ids", "finish_reason", "num_cached_tokens"}
        assert len(entry["token_ids"]) == 5
        assert entry["finish_reason"] == "length"
        assert bytes(i for i in entry["token_ids"] if i < 256).decode(errors="replace") == entry["text"]


def test_prompts_alone_and_together_get_the_same_text(jaxllm):
    flags = ("--max-tokens", "6", "--ignore-eos", "--json")
    together = json.loads(jaxllm("generate", "hello", "good bye", *flags)[1])["outputs"]
    alone = [json.loads(jaxllm("generate", prompt, *flags)[1])["outputs"][0] for prompt in ("hello", "good bye")]
    assert [entry["token_ids"] for entry in together] == [entry["token_ids"] for entry in alone]


def test_plain_output_of_one_prompt_is_its_text(jaxllm):
    flags = ("--max-tokens", "6", "--ignore-eos")
    text = json.loads(jaxllm("generate", "hello", *flags, "--json")[1])["outputs"][0]["text"]
    assert jaxllm("generate", "hello", *flags) == (0, text + "\n", "")


def test_prompts_come_from_a_file_and_from_standard_input(jaxllm, tmp_path, monkeypatch):
    file = tmp_path / "prompts.txt"
    file.write_text("from a file\nüber\n", encoding="utf-8")
    flags = ("--max-tokens", "1", "--json")
    code, out, _ = jaxllm("generate", "--prompts-file", str(file), *flags)
    assert code == 0
    assert [entry["prompt"] for entry in json.loads(out)["outputs"]] == ["from a file", "über"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("piped one\npiped two\n"))
    code, out, _ = jaxllm("generate", "given", "-", *flags)
    assert code == 0
    assert [entry["prompt"] for entry in json.loads(out)["outputs"]] == ["given", "piped one", "piped two"]


def test_only_newlines_separate_the_prompts_of_a_file(jaxllm, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("one\u2028line\n", encoding="utf-8")
    _, out, _ = jaxllm("generate", "--prompts-file", str(file), "--max-tokens", "1", "--json")
    assert [entry["prompt"] for entry in json.loads(out)["outputs"]] == ["one\u2028line"]


def test_one_bad_prompt_of_three_is_reported_and_the_others_answered(jaxllm):
    prompts = ["first", "x" * 200, "third"]
    code, out, err = jaxllm("generate", *prompts, "--max-tokens", "3", "--ignore-eos", "--json")
    assert code == 1
    entries = {entry["prompt"]: entry for entry in json.loads(out)["outputs"]}
    assert len(entries["first"]["token_ids"]) == len(entries["third"]["token_ids"]) == 3
    assert "200 tokens" in entries[prompts[1]]["error"]
    assert ERROR.fullmatch(err)
    assert "prompt 2" in err and "max_model_len is 96" in err


def test_entry_of_a_refused_prompt_has_the_keys_of_every_entry(jaxllm):
    _, out, _ = jaxllm("generate", "x" * 200, "--max-tokens", "1", "--json")
    (entry,) = json.loads(out)["outputs"]
    assert set(entry) >= {"prompt", "text", "token_ids", "finish_reason", "num_cached_tokens"}


def test_several_completions_are_labelled(jaxllm):
    code, out, _ = jaxllm(
        "generate", "hi", "--n", "2", "--max-tokens", "2", "--ignore-eos", "--temperature", "1", "--json"
    )
    assert code == 0
    assert [entry["index"] for entry in json.loads(out)["outputs"]] == [0, 1]
    _, out, _ = jaxllm("generate", "hi", "--n", "2", "--max-tokens", "2", "--ignore-eos")
    assert "[1.1] hi" in out and "[1.2] hi" in out


def test_chat_uses_the_template(jaxllm):
    code, out, err = jaxllm("chat", "hi", "--system", "be brief", "--max-tokens", "4", "--ignore-eos", "--json")
    assert (code, err) == (0, "")
    (entry,) = json.loads(out)["outputs"]
    assert entry["prompt"] == "<|bos|>system\nbe brief<|eos|>\nuser\nhi<|eos|>\nassistant\n"
    assert len(entry["token_ids"]) == 4


def test_collectives_reports_the_mesh(jaxllm):
    code, out, err = jaxllm("collectives", "--mesh", "tp=2", "--sharding-rules", "megatron", "--json")
    assert (code, err) == (0, "")
    counts = json.loads(out)
    assert (counts["mesh"], counts["num_layers"]) == ({"tp": 2}, 2)
    assert counts["per_block"]["all-reduce"] == 2


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["generat"],
        ["generate", "x", "--frobnicate"],
        ["generate", "--prompt", "x"],  # no abbreviation of --prompts-file
        ["generate", "x", "--max-tokens", "many"],
        ["bench"],
        ["generate", "x", "--dtype", "int3"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2(argv, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(argv)
    assert exit_.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("usage: jaxllm")


def test_version_and_help_exit_with_0(capsys):
    for argv in (["--version"], ["--help"], ["generate", "--help"]):
        with pytest.raises(SystemExit) as exit_:
            main(argv)
        assert exit_.value.code == 0
        assert "jaxllm" in capsys.readouterr().out


DOUBLED = '[parameters]\nmodel_in = "tp"\nheads = "tp"\n[activations]\nheads = "tp"\n'
UNKNOWN = '[parameters]\nffn = "xp"\n'


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--temperature", "nan"], ["temperature=nan", "finite"]),
        (["--top-p", "1.5"], ["top_p=1.5", "between"]),
        (["--max-tokens", "0"], ["max_tokens=0"]),
        (["--max-model-len", "0"], ["max_model_len=0"]),
        (["--max-model-len", "20000"], ["max_model_len=20000", "16384"]),
        (["--kv-cache-memory-bytes", "20000"], ["max_model_len=96", "kv_cache_memory_bytes"]),
        (["--max-num-batched-tokens", "2"], ["max_num_batched_tokens=2", "max_num_seqs=4"]),
        (["--model", "no-such-model"], ["no-such-model", "smollm2-135m-instruct"]),
        (["--model", "./no/such/folder"], ["./no/such/folder", "no such file"]),
        (["--tokenizer", "./no/such/folder"], ["./no/such/folder"]),
        (["--mesh", "tp=9"], ["'tp=9'", "there are 8"]),
        (["--mesh", "tp=3"], ["num_heads=4", "tp=1, 2 or 4"]),
        (["--mesh", "pp=2"], ["'pp=2'", "dp, fsdp, cp, ep, tp"]),
        (["--sharding-rules", "nonesuch"], ["'nonesuch'", "megatron"]),
        (["--sharding-rules", UNKNOWN], ["ffn = 'xp'", "dp, fsdp, cp, ep, tp"]),
        (["--sharding-rules", DOUBLED, "--mesh", "tp=2"], ["'tp' on two dims"]),
        (["--prompts-file", "no/such/file"], ["no/such/file", "No such file"]),
    ],
    ids=lambda v: " ".join(v)[:40] if v and v[0].startswith("--") else "",
)
def test_what_a_user_gets_wrong_is_one_line_on_standard_error(args, named, tiny, tmp_path, capsys):
    rules = tmp_path / "mine.toml"
    if args[0] == "--sharding-rules" and "\n" in args[1]:
        rules.write_text(args[1], encoding="utf-8")
        args = [args[0], str(rules), *args[2:]]
    code = main(["generate", "hello", "--model", str(tiny), *SMALL, *args])
    out, err = capsys.readouterr()
    assert (code, out) == (1, "")
    assert ERROR.fullmatch(err), err
    for part in named:
        assert part in err


def test_no_prompt_and_empty_prompts_are_refused(jaxllm, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    code, out, err = jaxllm("generate")
    assert (code, out) == (1, "")
    assert "there is no prompt" in err
    code, out, err = jaxllm("generate", "", "--max-tokens", "1")
    assert (code, out) == (1, "")
    assert "prompt 1: the prompt is empty" in err
    code, out, err = jaxllm("chat", "  ")
    assert (code, out) == (1, "")
    assert "the question is empty" in err


def test_mesh_that_the_environment_has_no_devices_for_fails_without_a_traceback(tiny):
    """As a process: the number of devices is fixed once per process."""
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "2"}
    process = start("generate", "hi", "--model", str(tiny), "--mesh", "tp=4", env=environment, stderr=subprocess.PIPE)
    out, err = process.communicate(timeout=patience(120))
    assert (process.returncode, out) == (1, "")
    assert ERROR.fullmatch(err), err
    assert "needs 4 devices but there are 2" in err


def test_module_reads_standard_input_and_uses_the_devices_it_is_given(tiny):
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "2"}
    flags = ["--model", str(tiny), *SMALL, "--mesh", "tp=2", "--max-tokens", "3", "--ignore-eos", "--json"]
    process = start("generate", *flags, env=environment, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate("one\ntwo\n", timeout=patience(120))
    assert (process.returncode, err) == (0, "")
    assert [entry["prompt"] for entry in json.loads(out)["outputs"]] == ["one", "two"]


def test_interrupt_during_a_long_generate_exits_130_within_seconds(tiny):
    """Standard error is a terminal: its progress bar tells that generating has begun."""
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 80))
    flags = ["--model", str(tiny), "--kv-cache-memory-bytes", "10000000", "--max-tokens", "15000", "--ignore-eos"]
    process = start("generate", "hello", *flags, stderr=slave)
    os.close(slave)
    try:
        err = _read_until(master, b"generate:", seconds=120)
        time.sleep(3)  # past the compilations
        assert process.poll() is None, "it generated 15000 tokens in 3 s: ask for more"
        interrupted = time.monotonic()
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=patience(60))
        assert time.monotonic() - interrupted < patience(20)
        err += _read_until(master, b"interrupted", seconds=10)
    finally:
        process.kill()
        os.close(master)
    assert process.returncode == 130
    assert out == ""
    assert b"jaxllm: interrupted" in err and b"Traceback" not in err


INTERRUPTED_IN_A_COLLECTION = """
import gc, signal, sys
from jaxllm.cli import main
from jaxllm.engine.engine import Engine
step, count = Engine.step, 0

def interrupt(phase, info):
    gc.callbacks.remove(interrupt)
    signal.raise_signal(signal.SIGINT)

def step_and_collect(self):
    global count
    count += 1
    if count == 5:
        gc.callbacks.append(interrupt)
        gc.collect()
    return step(self)

Engine.step = step_and_collect
sys.exit(main(sys.argv[1:]))
"""


def test_interrupt_during_a_garbage_collection_is_not_lost(tiny):
    flags = ["generate", "hello", "--model", str(tiny), *SMALL, "--max-tokens", "60", "--ignore-eos"]
    command = [sys.executable, "-c", INTERRUPTED_IN_A_COLLECTION, *flags]
    process = subprocess.run(command, capture_output=True, text=True, timeout=patience(120))
    assert (process.returncode, process.stdout) == (130, "")


def _read_until(terminal: int, marker: bytes, seconds: float) -> bytes:
    text, deadline = b"", time.monotonic() + seconds
    while marker not in text and time.monotonic() < deadline:
        try:
            text += os.read(terminal, 4096)
        except OSError:  # the other end is closed
            break
    assert marker in text, text
    return text
