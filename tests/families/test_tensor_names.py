"""Files name their tensors in several ways: the same parameters come out, and nothing that matters goes unread."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from jaxllm.checkpoints import open_checkpoint
from jaxllm.families import notices, read_config
from jaxllm.families.tensor_names import named
from jaxllm.sharding.mesh import Placement, make_mesh
from jaxllm.sharding.rules import load_rules
from jaxllm.weights.abstract import abstract_model
from jaxllm.weights.convert import convert
from jaxllm.weights.loader import load_parameters
from jaxllm.weights.orbax import restore_parameters

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def rewritten(tiny_model: Callable, tmp_path: Path) -> Callable[..., Path]:
    """`rewritten(name, change, **config)`: a tiny checkpoint with other tensors and other fields."""

    def make(name: str, change: Callable[[Tensors], Tensors], **config: Any) -> Path:
        notices.say_once.cache_clear()
        shutil.copytree(tiny_model(name).folder, tmp_path, dirs_exist_ok=True)
        tensors = change(load_file(tmp_path / "model.safetensors"))
        save_file({key: value.clone().contiguous() for key, value in tensors.items()}, tmp_path / "model.safetensors")
        hf = json.loads((tmp_path / "config.json").read_text()) | config
        (tmp_path / "config.json").write_text(json.dumps(hf))
        return tmp_path

    return make


def parameters(folder: Path) -> dict[Any, np.ndarray]:
    """Every parameter of the checkpoint as it is loaded, in float32."""
    checkpoint = named(open_checkpoint(folder))
    placement = Placement(make_mesh("tp=1"), load_rules("replicated"))
    model = abstract_model(read_config(checkpoint.config), placement, jnp.dtype("float32"))
    loaded = nnx.to_flat_state(load_parameters(model, checkpoint))
    return {path: np.asarray(variable.get_value()) for path, variable in loaded}


def assert_same(ours: dict[Any, np.ndarray], theirs: dict[Any, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys()
    for path in ours:
        np.testing.assert_array_equal(ours[path], theirs[path], err_msg=str(path))


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("llama", "model."),
        ("qwen3", "model."),
        ("gemma2", "model."),
        ("deepseek_v3", "model."),
        ("mixtral", "model."),
        ("gpt2", "transformer."),
    ],
)
def test_the_prefix_of_the_inner_model_may_be_left_out(name, prefix, rewritten, tiny_model) -> None:
    folder = rewritten(name, lambda tensors: {key.removeprefix(prefix): value for key, value in tensors.items()})
    assert_same(parameters(folder), parameters(tiny_model(name).folder))


def test_buffers_of_older_releases_are_passed_over(rewritten, tiny_model) -> None:
    buffers = {"h.0.attn.bias": torch.ones(1, 1, 8, 8), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    folder = rewritten(
        "gpt2", lambda tensors: {k.removeprefix("transformer."): v for k, v in tensors.items()} | buffers
    )
    assert_same(parameters(folder), parameters(tiny_model("gpt2").folder))


def test_one_tensor_under_two_names_is_refused(rewritten) -> None:
    name = "layers.0.mlp.down_proj.weight"
    folder = rewritten("llama", lambda tensors: tensors | {name: tensors[f"model.{name}"]})
    with pytest.raises(ValueError, match=f"unexpected tensor {name}"):
        parameters(folder)


def with_extra_layer(tensors: Tensors, index: int = 3) -> Tensors:
    """DeepSeek's layer after the last: one more block, and what joins a token's embedding to its hidden state."""
    block = {k.replace(".layers.2.", f".layers.{index}."): v for k, v in tensors.items() if ".layers.2." in k}
    name = f"model.layers.{index}"
    extra = {f"{name}.eh_proj.weight": torch.zeros(64, 128), f"{name}.shared_head.norm.weight": torch.ones(64)}
    return tensors | block | extra


@pytest.mark.parametrize("declared", [{"num_nextn_predict_layers": 1}, {}, {"num_nextn_predict_layers": 0}])
def test_a_layer_that_predicts_ahead_is_left_out_at_any_depth(declared, rewritten, tiny_model, caplog) -> None:
    folder = rewritten("deepseek_v3", with_extra_layer, **declared)
    assert_same(parameters(folder), parameters(tiny_model("deepseek_v3").folder))
    assert [record.getMessage() for record in caplog.records if "layers 3" in record.getMessage()]


def test_prediction_layers_under_a_name_of_their_own_are_left_out(rewritten, tiny_model, caplog) -> None:
    extra = {"model.mtp.0.proj.weight": torch.zeros(4, 4), "mtp.layers.0.norm.weight": torch.zeros(4)}
    folder = rewritten("qwen3", lambda tensors: tensors | extra)
    assert_same(parameters(folder), parameters(tiny_model("qwen3").folder))
    assert "2 tensors of layers mtp are ignored" in caplog.text


def test_a_layer_beyond_the_last_that_is_an_ordinary_one_is_refused(rewritten) -> None:
    """As when num_hidden_layers is wrong: the file has more layers than would be computed."""
    more = lambda tensors: tensors | {k.replace("layers.1.", "layers.2."): v for k, v in tensors.items()}
    with pytest.raises(ValueError, match=r"unexpected tensor model\.layers\.2\."):
        parameters(rewritten("llama", more))


@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
def test_a_copy_of_tied_embeddings_is_tied_again(name, rewritten, tiny_model, caplog) -> None:
    table = "transformer.wte.weight" if name == "gpt2" else "model.embed_tokens.weight"
    folder = rewritten(name, lambda tensors: tensors | {"lm_head.weight": tensors[table]})
    assert_same(parameters(folder), parameters(tiny_model(name).folder))
    assert not caplog.records


@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
def test_a_head_of_its_own_is_used_although_the_configuration_ties(name, rewritten, caplog) -> None:
    """What transformers 5 does: its own loaded head is the oracle."""
    table = "transformer.wte.weight" if name == "gpt2" else "model.embed_tokens.weight"

    def other(tensors: Tensors) -> Tensors:
        head = tensors[table].clone()
        head[-1, -1] += 1
        return tensors | {"lm_head.weight": head}

    folder = rewritten(name, other)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours = parameters(folder)
    np.testing.assert_array_equal(ours["lm_head",], theirs.get_output_embeddings().weight.detach().numpy())
    np.testing.assert_array_equal(ours["embedding",], theirs.get_input_embeddings().weight.detach().numpy())
    assert not np.array_equal(ours["lm_head",], ours["embedding",])
    assert "tie_word_embeddings=true but lm_head.weight differs" in caplog.text


def test_tied_embeddings_saved_under_the_heads_name_are_found(rewritten, tiny_model) -> None:
    def only_head(tensors: Tensors) -> Tensors:
        return {k.replace("model.embed_tokens.", "lm_head."): v for k, v in tensors.items()}

    assert_same(parameters(rewritten("qwen2", only_head)), parameters(tiny_model("qwen2").folder))


@pytest.mark.parametrize("change", ["bias the configuration does not name", "bias that is missing"])
def test_biases_and_configuration_must_agree(change: str, rewritten) -> None:
    name = "model.layers.0.self_attn.q_proj.bias"
    if change.endswith("missing"):
        folder = rewritten("llama", lambda tensors: tensors, attention_bias=True)
        match = f"no tensor {name}"
    else:
        folder = rewritten("llama", lambda tensors: tensors | {name: torch.ones(64)})
        match = f"unexpected tensor {name}"
    with pytest.raises(ValueError, match=match.replace(".", r"\.")):
        parameters(folder)


@pytest.mark.parametrize("to", ["safetensors", "orbax"])
def test_what_convert_writes_of_such_a_file_says_what_the_file_holds(to, rewritten, tmp_path_factory) -> None:
    """Usual names, no layer that is not used, and a configuration that does not tie."""

    def change(tensors: Tensors) -> Tensors:
        head = tensors["model.embed_tokens.weight"] + 1
        extra = {"mtp.0.norm.weight": torch.ones(4)}
        return {key.removeprefix("model."): value for key, value in tensors.items()} | extra | {"lm_head.weight": head}

    folder = rewritten("qwen2", change)
    target = tmp_path_factory.mktemp("converted") / to
    convert(str(folder), target, to=to, dtype="float32")
    assert json.loads((target / "config.json").read_text())["tie_word_embeddings"] is False
    if to == "safetensors":
        assert_same(parameters(target), parameters(folder))
        assert all(name.startswith(("model.", "lm_head.")) for name in load_file(target / "model.safetensors"))
    else:
        placement = Placement(make_mesh("tp=1"), load_rules("replicated"))
        model = abstract_model(read_config(open_checkpoint(target).config), placement, jnp.dtype("float32"))
        restored = nnx.to_flat_state(restore_parameters(model, target))
        assert_same({path: np.asarray(v.get_value()) for path, v in restored}, parameters(folder))
