"""Whole runs: meshes and accumulation change nothing, a stopped run goes on bit for bit, what comes out is served."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from jaxllm.training.checkpoint import Checkpoints
from jaxllm.training.trainer import Trainer
from tests.training.conftest import losses, train_small

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


@pytest.fixture(scope="module")
def alone(text, tmp_path_factory):
    """A run on one device."""
    return train_small(tmp_path_factory.mktemp("alone"), data=str(text))


@pytest.mark.parametrize(
    ("mesh", "rules"), [("tp=2", "megatron"), ("fsdp=4", "fsdp"), ("dp=2", "megatron"), ("dp=2,tp=2", "megatron")]
)
def test_a_mesh_trains_as_one_device(run, alone, mesh, rules):
    cut = run("cut", mesh=mesh, sharding_rules=rules, optimizer="adamw")
    assert np.allclose(losses(cut), losses(alone), rtol=0, atol=2e-5)
    assert cut["eval_loss"] == pytest.approx(alone["eval_loss"], abs=2e-5)


def test_accumulation_and_recomputation_equal_one_large_batch(run, alone):
    pieces = run("pieces", batch_size=2, grad_accumulation=4, remat=True)
    assert np.allclose(losses(pieces), losses(alone), rtol=0, atol=2e-5)


def test_muon_learns(run):
    report = run("muon", optimizer="muon", learning_rate=0.01, compute_dtype="bfloat16")
    assert losses(report)[-1] < losses(report)[0] - 0.3


def test_a_run_that_was_killed_goes_on_bit_for_bit(run, tmp_path, monkeypatch):
    whole = run("whole", save_every=2)
    said = Trainer._say
    for killed_at in (3, 5):

        def dies(self, number, *args, killed_at=killed_at, **kwargs):
            if number == killed_at:
                raise KeyboardInterrupt
            return said(self, number, *args, **kwargs)

        monkeypatch.setattr(Trainer, "_say", dies)
        with pytest.raises(KeyboardInterrupt):
            run("killed", save_every=2, resume=True)
    monkeypatch.setattr(Trainer, "_say", said)
    resumed = run("killed", save_every=2, resume=True)
    assert losses(resumed) == losses(whole)
    assert resumed["eval_loss"] == whole["eval_loss"]
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("killed", "whole"))
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    states = [_newest(tmp_path / name) for name in ("killed", "whole")]
    assert states[0].keys() == states[1].keys() and len(states[0]) > 20
    assert all(np.array_equal(states[0][name], states[1][name]) for name in states[0])


def _newest(output: Path) -> dict[str, np.ndarray]:
    """Every leaf of the newest state: step, parameters and moments."""
    import orbax.checkpoint as ocp

    checkpoints = Checkpoints(output, 2)
    step = checkpoints.newest
    checkpoints.close()
    with ocp.StandardCheckpointer() as reader:
        return reader.restore((output / "checkpoints" / str(step) / "state").absolute())["leaves"]


def test_another_run_is_not_resumed(run):
    run("first", steps=2, eval_every=2)
    with pytest.raises(ValueError, match=r"made with learning_rate=None, not 0\.5"):
        run("first", steps=2, eval_every=2, resume=True, learning_rate=0.5)
    with pytest.raises(ValueError, match="not empty; say --resume"):
        run("first", steps=2)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3"])
def test_what_comes_out_is_a_model_of_transformers_and_of_ours(run, tmp_path, architecture):
    from jaxllm import LLM, SamplingParams

    run("model", architecture=architecture, steps=40, learning_rate=0.01, eval_every=40)
    folder = tmp_path / "model"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("the cat", return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == "the cat"
    with torch.no_grad():
        wanted = model.generate(ids, do_sample=False, max_new_tokens=5, min_new_tokens=5)[0, ids.shape[1] :].tolist()
    with LLM(str(folder), dtype="float32", max_model_len=16, max_num_seqs=2, max_num_batched_tokens=16) as llm:
        ours = llm.generate(["the cat"], SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True))
    assert list(ours[0].outputs[0].token_ids) == wanted
    assert ours[0].outputs[0].text.isprintable()


def test_a_classifier_is_one_of_transformers(run, tiny_llama, tmp_path):
    data = tmp_path / "labels.tsv"
    data.write_text(
        "".join(f"{'spam' if i % 3 == 0 else 'ham'}\ttext {i} {'win ' * (i % 3 == 0)}\n" for i in range(24)),
        encoding="utf-8",
    )
    scratch = {"num_layers": None, "num_heads": None, "hidden_size": None, "context_length": None}
    report = run(
        "classifier",
        task="classify",
        model=str(tiny_llama),
        data=str(data),
        learning_rate=1e-3,
        steps=12,
        eval_every=12,
        eval_fraction=0.25,
        **scratch,
    )
    folder = tmp_path / "classifier"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert model.config.id2label == {0: "ham", 1: "spam"}
    right = 0
    held = [line.split("\t") for line in data.read_text(encoding="utf-8").splitlines()]
    order = np.random.default_rng((0, len(held))).permutation(len(held))[:6]
    for i in order:
        label, words = held[i]
        with torch.no_grad():
            right += model.config.id2label[int(model(**tokenizer(words, return_tensors="pt")).logits.argmax())] == label
    assert right / 6 == pytest.approx(report["eval_accuracy"])


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_adapter_merged_is_the_model_that_was_trained_also_in_peft(run, tiny_llama, instructions, tmp_path):
    from jaxllm.training.merge import merge

    scratch = {"num_layers": None, "num_heads": None, "hidden_size": None, "context_length": None}
    fields = {"task": "sft", "model": str(tiny_llama), "data": str(instructions), "batch_size": 2, **scratch}
    report = run("adapter", lora_rank=4, lora_targets="q_proj,v_proj,down_proj", learning_rate=0.02, **fields)
    assert report["eval_loss"] < report["eval_loss_before"] - 0.1
    merge(str(tmp_path / "adapter"), None, tmp_path / "merged", "float32")
    again = run("again", steps=1, learning_rate=0.0, **fields | {"model": str(tmp_path / "merged")})
    assert again["eval_loss_before"] == pytest.approx(report["eval_loss"], abs=2e-4)
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_llama, tmp_path / "merged"))
    changed = {name.split(".")[-2] for name in after if not np.array_equal(before[name], after[name])}
    assert changed == {"q_proj", "v_proj", "down_proj"}
    facts = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (facts["r"], facts["lora_alpha"], facts["base_model_name_or_path"]) == (4, 8.0, str(tiny_llama))
    base, merged = (
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
        for folder in (tiny_llama, tmp_path / "merged")
    )
    tokens = torch.arange(3, 43)[None]
    with torch.no_grad():
        plain, expected = base(tokens).logits, merged(tokens).logits
        of_peft = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(tokens).logits
    torch.testing.assert_close(of_peft, expected, atol=1e-4, rtol=1e-4)
    assert (of_peft - plain).abs().max() > 0.1
