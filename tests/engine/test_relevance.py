"""Classifiers give transformers' probabilities, and rerankers the scores that their logits say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from jaxllm import LLM, SamplingParams
from tests.helpers.byte_tokenizer import VOCAB_SIZE, write_byte_tokenizer

SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
ENGINE = {
    "dtype": "float32",
    "max_model_len": 200,
    "kv_cache_memory_bytes": 16 << 20,
    "max_num_batched_tokens": 64,
    "use_tqdm": False,
}
TEXTS = ["a short one", "a text that is longer than one chunk of a scoring pass, so that two are needed for it to end"]


def save(folder: Path, family: str, num_labels: int, **config):
    import transformers

    torch.manual_seed(0)
    sizes = dict(SIZES)
    if family == "GPT2":
        sizes = {
            "vocab_size": VOCAB_SIZE,
            "n_embd": 64,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 256,
            "initializer_range": 0.2,
            "pad_token_id": 0,
        }
    name = "Gemma3Text" if family == "Gemma3" else family
    settings = getattr(transformers, f"{name}Config")(**sizes, num_labels=num_labels, **config)
    model = getattr(transformers, f"{name}ForSequenceClassification")(settings).eval()
    model.save_pretrained(folder)
    write_byte_tokenizer(folder)
    return model


def torch_logits(model, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long)).logits[0].numpy()


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3", "Gemma2", "Gemma3", "GPT2"])
def test_probabilities_are_transformers(family, tmp_path):
    model = save(tmp_path, family, 3)
    llm = LLM(str(tmp_path), **ENGINE)
    for output, raw in zip(llm.classify(TEXTS), llm.classify(TEXTS, use_activation=False), strict=True):
        expected = torch_logits(model, output.prompt_token_ids)
        np.testing.assert_allclose(raw.outputs.probs, expected, atol=1e-4, rtol=1e-4)
        np.testing.assert_allclose(output.outputs.probs, torch.tensor(expected).softmax(0), atol=1e-4)
        assert output.outputs.label == f"LABEL_{int(expected.argmax())}" and output.outputs.num_classes == 3
    with pytest.raises(ValueError, match="the model is a classifier"):
        llm.generate("text", SamplingParams())
    with pytest.raises(ValueError, match="3 labels"):
        llm.score("query", "text")


def test_a_classifier_of_one_label_scores_pairs(tmp_path):
    model = save(tmp_path, "Qwen3", 1)
    llm = LLM(str(tmp_path), **ENGINE)
    outputs = llm.score("what is it", TEXTS)
    for output in outputs:
        logit = torch_logits(model, output.prompt_token_ids)[0]
        assert output.outputs.score == pytest.approx(1 / (1 + np.exp(-logit)), abs=1e-4)
    assert llm.score(["what is it"] * 2, TEXTS)[1].outputs.score == outputs[1].outputs.score
    with pytest.raises(ValueError, match="2 queries for 1 texts"):
        llm.score(["a", "b"], ["c"])


def test_any_other_model_is_asked_for_yes_or_no(tiny_llama):
    import transformers

    llm = LLM(str(tiny_llama), **ENGINE | {"max_model_len": 1024})
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    tokenizer = llm.get_tokenizer()
    yes, no = (tokenizer.encode(word, add_special_tokens=False)[0] for word in ("yes", "no"))
    for output, text in zip(llm.score("what is it", TEXTS), TEXTS, strict=True):
        assert text in tokenizer.decode(output.prompt_token_ids)
        with torch.no_grad():
            logits = model(torch.tensor([output.prompt_token_ids])).logits[0, -1].double()
        expected = torch.softmax(logits[[no, yes]], 0)[1]
        assert output.outputs.score == pytest.approx(float(expected), abs=1e-4)
    with pytest.raises(ValueError, match="no classifier"):
        llm.classify("text")


def test_a_classifier_without_its_head_is_refused(tmp_path):
    from safetensors.numpy import load_file, save_file

    save(tmp_path, "Llama", 2)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["score.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"score\.weight"):
        LLM(str(tmp_path), **ENGINE)
