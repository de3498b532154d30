"""Fifty AdamW steps give torch's losses: schedule, clipping, decay on matrices only."""

from __future__ import annotations

import jax
import numpy as np
import torch
import transformers
from flax import nnx

from jaxllm.checkpoints import open_checkpoint
from jaxllm.families.registry import read_config
from jaxllm.sharding.mesh import Placement, make_mesh
from jaxllm.sharding.rules import load_rules
from jaxllm.training.config import TrainConfig
from jaxllm.training.data.batches import Stream
from jaxllm.training.loss import LossModel, Objective, name_of
from jaxllm.training.optimizer import learning_rate, make_optimizer
from jaxllm.training.step import TrainStep
from jaxllm.training.trained import choose_trained
from jaxllm.weights.abstract import abstract_model
from jaxllm.weights.loader import load_parameters

STEPS, SPANS, SPAN = 50, 4, 24


def torch_losses(folder, config: TrainConfig, batches: list) -> list[float]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").train()
    groups = [
        {"params": [p for p in model.parameters() if (p.ndim > 1) == decays], "weight_decay": decay}
        for decays, decay in ((True, config.weight_decay), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(config.beta1, config.beta2), eps=1e-8)
    schedule, losses = learning_rate(config, STEPS), []
    for i, batch in enumerate(batches):
        ids, targets = (torch.tensor(a.reshape(SPANS, SPAN)).long() for a in (batch.tokens, batch.targets))
        logits = model(ids).logits
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = float(schedule(i))
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_fifty_steps_have_torchs_losses(tiny_llama):
    config = TrainConfig(data="-", output="-", model=str(tiny_llama), learning_rate=3e-3, warmup_steps=5, steps=STEPS)
    checkpoint = open_checkpoint(tiny_llama)
    placement = Placement(make_mesh("tp=1"), load_rules("megatron"))
    model = abstract_model(read_config(checkpoint.config), placement, np.dtype(np.float32))
    values = {name_of(path): leaf.get_value() for path, leaf in nnx.to_flat_state(load_parameters(model, checkpoint))}
    trained = choose_trained(config, model, values, None, 0)
    assert not any(name.endswith(("scale", "norm")) for name in trained.matrices) and "embedding" in trained.matrices
    step = TrainStep(
        LossModel(model, SPAN, Objective()),
        make_optimizer(config, learning_rate(config, STEPS), trained.matrices),
        trained.shardings,
        config.max_grad_norm,
    )
    # A text with an order to learn, so that the losses fall far enough to tell one optimiser from another.
    tokens = (np.arange(4000) * 7 % 41 + 5 + (np.arange(4000) // 100) % 3).astype(np.int32)
    stream = Stream(tokens, np.array([]), spans=SPANS, span=SPAN, seed=1)
    batches = [stream.batch(i // stream.num_batches(0), i % stream.num_batches(0)) for i in range(STEPS)]
    state, compiled, ours = step.initial(trained.parameters), step.compiled(), []
    for batch in batches:
        state, report = compiled(state, jax.tree.map(lambda a: a[None], batch), np.float32(SPANS * SPAN), {})
        ours.append(float(report.loss))
    theirs = torch_losses(tiny_llama, config, batches)
    assert theirs[-1] < theirs[0] - 1
    assert np.abs(np.array(ours) - theirs).max() <= 1e-3
