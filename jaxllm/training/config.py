"""How one training run goes.

Flags or a TOML file -> `TrainConfig`, checked. Knows nothing of models, arrays, devices or text.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jaxllm.config.fields import check_types, describe

Task = Literal["pretrain", "sft", "classify"]
ComputeDtype = Literal["auto", "bfloat16", "float32"]
Optimizer = Literal["adamw", "muon"]
Schedule = Literal["cosine", "linear", "constant"]
TASKS: tuple[str, ...] = ("pretrain", "sft", "classify")
# Where nobody says anything: pretraining makes many small steps, fine-tuning a few passes over what there is.
_BY_TASK: dict[str, dict[str, Any]] = {
    "pretrain": {"learning_rate": 1e-3, "batch_size": 12},
    "sft": {"learning_rate": 5e-5, "batch_size": 4, "epochs": 2},
    "classify": {"learning_rate": 5e-5, "batch_size": 8, "epochs": 5},
}
_LORA_LEARNING_RATE = 2e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """One training run. Every field is a flag of `jaxllm train` and a name of its TOML file.

    Attributes:
        task: pretrain, sft (instructions) or classify.
        data (FILE): text, .jsonl, .json or .tsv; or a folder with train, valid and test files.
        eval_data (FILE): held-out data; default: a share of the training data.
        eval_fraction (SHARE): of the data, held out for evaluation.
        test_fraction (SHARE): of the data, kept apart and measured before the first and after the last step only.
        output (DIR): the trained model, the log and the checkpoints.
        model: short name, folder, .gguf file or Hugging Face id to start from; default: from scratch.
        architecture: of a model from scratch: llama, gpt2, qwen3 or mixtral, the name of a preset, or a config.json.
        depth (N): the one dial of a model from scratch: N layers, and everything else follows.
        num_layers (N): of a model from scratch.
        num_heads (N): of a model from scratch.
        num_kv_heads (N): of a model from scratch; default: as many as heads.
        hidden_size (N): of a model from scratch.
        intermediate_size (N): width of its feed-forward half; default: what the architecture makes of hidden_size.
        tokenizer: of a model from scratch: char, byte, bpe:SIZE (trained on the data), or another model's name.
        template: how instructions become text where the model has no chat template: alpaca or chatml.
        steps (N): optimiser steps; default: what epochs makes.
        epochs (N): passes over the training data.
        batch_size (N): spans of context_length tokens in a step, on all devices together.
        grad_accumulation (N): batches whose derivatives are added up before a step.
        context_length (TOKENS): of a span; default: pretrain 256 or what the model has, else the longest document.
        learning_rate (X): at its highest; default: by task, pretrain 1e-3, sft and classify 5e-5, LoRA 2e-4.
        min_learning_rate (X): at the end of the schedule; default: a tenth of the highest.
        schedule: of the learning rate after the warm-up.
        warmup_steps (N): over which the learning rate rises; default: a twentieth of the steps, at most 100.
        optimizer: muon takes matrices of blocks by orthogonalised momentum, and the rest by AdamW.
        beta1 (X): decay of AdamW's first moment.
        beta2 (X): decay of AdamW's second moment.
        weight_decay (X): of matrices; norms and biases have none.
        max_grad_norm (X): to which derivatives are clipped; 0: not at all.
        z_loss (X): weight of the squared log-denominator of the softmax.
        router_balance (X): weight of the load-balancing loss of routed experts.
        compute_dtype: of products; weights are kept in float32. auto: bfloat16 where the devices multiply
            it.
        remat: keep only the inputs of blocks for the derivative and compute the rest again: less memory, more work.
        lora_rank (R): train a low-rank adapter and leave the weights alone; 0: train the weights.
        lora_alpha (A): the adapter's product is scaled by alpha / rank; default: twice the rank.
        lora_targets (NAMES): comma-separated PEFT names such as q_proj,v_proj; default: every linear layer of a block.
        use_rslora: scale by alpha / sqrt(rank) instead.
        trainable (PARTS): of the weights: all, last (the last block, the final norm and the head), or head.
        balance_labels: classify: use as many examples of every label as the rarest has.
        eval_every (N): steps between evaluations on held-out data; default: ten in a run.
        eval_batches (N): most batches of one evaluation, apart from the last.
        save_every (N): steps between checkpoints; default: with every evaluation.
        keep_checkpoints (N): the newest ones, older ones are deleted.
        sample_every (N): steps between sample texts; default: only at the end; 0: none.
        sample_prompt (TEXT): what the samples continue.
        sample_tokens (TOKENS): of one sample.
        resume: go on from the newest checkpoint in output, bit for bit as if nothing had happened.
        tensorboard: write TensorBoard events too; needs the package tensorboardX.
        plot: draw the losses into loss.png at the end.
        seed: of weights from scratch, the order of the data and splits.
        dtype: of the matrices in the trained model's files.
        mesh (AXES): devices, for example 'dp=2' or 'fsdp=4'.
        sharding_rules: shipped name or a .toml file; default: fsdp where the mesh has that axis, else megatron.
        coordinator_address (HOST:PORT): of process 0, where there are several.
        num_processes (N): how many processes there are.
        process_id (I): which of them this is, from 0.
    """

    task: Task = "pretrain"
    data: str = ""
    eval_data: str | None = None
    eval_fraction: float = 0.1
    test_fraction: float = 0.0
    output: str = ""
    model: str | None = None
    architecture: str = "llama"
    depth: int | None = None
    num_layers: int | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None
    hidden_size: int | None = None
    intermediate_size: int | None = None
    tokenizer: str | None = None
    template: Literal["alpaca", "chatml"] = "alpaca"
    steps: int | None = None
    epochs: int | None = None
    batch_size: int | None = None
    grad_accumulation: int = 1
    context_length: int | None = None
    learning_rate: float | None = None
    min_learning_rate: float | None = None
    schedule: Schedule = "cosine"
    warmup_steps: int | None = None
    optimizer: Optimizer = "adamw"
    beta1: float = 0.9
    beta2: float = 0.99
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    z_loss: float = 0.0
    router_balance: float = 0.01
    compute_dtype: ComputeDtype = "auto"
    remat: bool = False
    lora_rank: int = 0
    lora_alpha: float | None = None
    lora_targets: str | None = None
    use_rslora: bool = False
    trainable: Literal["all", "last", "head"] = "all"
    balance_labels: bool = False
    eval_every: int | None = None
    eval_batches: int = 50
    save_every: int | None = None
    keep_checkpoints: int = 2
    sample_every: int | None = None
    sample_prompt: str = "\n"
    sample_tokens: int = 100
    resume: bool = False
    tensorboard: bool = False
    plot: bool = True
    seed: int = 0
    dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16"
    mesh: str = "tp=1"
    sharding_rules: str | None = None
    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("data", "output"):
            if not getattr(self, name):
                raise ValueError(f"{name} is missing; say --{name} PATH")
        for name in _AT_LEAST_ONE:
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}={value}; it must be at least 1")
        for name in _AT_LEAST_ZERO:
            if (value := getattr(self, name)) is not None and not 0 <= value < float("inf"):
                raise ValueError(f"{name}={value}; it must be at least 0")
        for name in ("eval_fraction", "test_fraction", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; it must be in [0, 1)")
        if self.eval_fraction + self.test_fraction >= 1:
            raise ValueError("eval_fraction and test_fraction leave nothing to train on; lower them")
        self._check_model()

    def _check_model(self) -> None:
        sizes = ("depth", "num_layers", "num_heads", "num_kv_heads", "hidden_size", "intermediate_size", "tokenizer")
        for name in sizes if self.model else ():
            if getattr(self, name) is not None:
                raise ValueError(f"{name} is for a model from scratch, and model={self.model!r} has its own; leave one")
        if self.lora_rank and not self.model:
            raise ValueError("lora_rank adapts a model that there is; say --model NAME, or leave lora_rank out")
        if self.lora_rank and self.trainable != "all":
            raise ValueError(f"lora_rank leaves the weights alone, so trainable={self.trainable!r} has no meaning")
        if not self.lora_rank and (self.lora_alpha is not None or self.lora_targets or self.use_rslora):
            raise ValueError("lora_alpha, lora_targets and use_rslora are of an adapter; say --lora-rank R")
        if self.depth and (self.num_layers or self.num_heads or self.hidden_size):
            raise ValueError("depth says how large the model is; leave out num_layers, num_heads and hidden_size")
        if self.balance_labels and self.task != "classify":
            raise ValueError("balance_labels is for task classify; leave it out")

    @property
    def spans(self) -> int:
        """Spans in a micro-batch."""
        return self.batch_size or _BY_TASK[self.task]["batch_size"]

    @property
    def passes(self) -> int | None:
        """Epochs, where the number of steps is not given; None: the task has no number of its own."""
        return self.epochs if self.epochs is not None else _BY_TASK[self.task].get("epochs")

    @property
    def peak_learning_rate(self) -> float:
        """The highest learning rate."""
        if self.learning_rate is not None:
            return self.learning_rate
        return _LORA_LEARNING_RATE if self.lora_rank else _BY_TASK[self.task]["learning_rate"]

    @property
    def alpha(self) -> float:
        """LoRA's alpha."""
        return self.lora_alpha if self.lora_alpha is not None else 2.0 * self.lora_rank

    @property
    def rules(self) -> str:
        """The rule file."""
        return self.sharding_rules or ("fsdp" if "fsdp" in self.mesh else "megatron")


_AT_LEAST_ONE = (
    "depth num_layers num_heads num_kv_heads hidden_size intermediate_size steps epochs batch_size grad_accumulation "
    "context_length eval_every eval_batches save_every keep_checkpoints sample_tokens num_processes"
).split()
_AT_LEAST_ZERO = (
    "learning_rate min_learning_rate warmup_steps weight_decay max_grad_norm z_loss router_balance lora_rank "
    "lora_alpha sample_every process_id seed"
).split()


def read_toml(path: Path) -> dict[str, Any]:
    """Fields from a file. Raises ValueError that names the file and what is wrong with it."""
    try:
        fields = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from None
    fields = {name.replace("-", "_"): value for name, value in fields.items()}
    known = describe(TrainConfig)
    if unknown := sorted(fields.keys() - known.keys()):
        raise ValueError(f"{path} has an unknown field {unknown[0]!r}; known ones are {', '.join(known)}")
    return fields


def given(config: TrainConfig) -> Mapping[str, Any]:
    """The fields that are not as they are by default."""
    default = {name: doc.default for name, doc in describe(TrainConfig).items()}
    return {name: value for name, value in dataclasses.asdict(config).items() if value != default[name]}
