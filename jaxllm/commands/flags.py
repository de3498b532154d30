"""Flags that several commands share, and what they become: engine keywords, sampling parameters, an `LLM`."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

from jaxllm.commands.interrupts import raise_if_interrupted
from jaxllm.config import (
    ATTENTION_BACKENDS,
    DTYPES,
    KV_DTYPES,
    LOAD_FORMATS,
    MATMUL_BACKENDS,
    PREEMPTION_MODES,
    EngineConfig,
)

if TYPE_CHECKING:
    from jaxllm import LLM


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """One flag per field of `EngineConfig`, and --json."""
    default = EngineConfig()
    group = parser.add_argument_group("engine")
    group.add_argument("--model", default=default.model, help="short name, folder, .gguf file or Hugging Face id")
    group.add_argument("--tokenizer", help="take the tokenizer from this model instead")
    group.add_argument("--load-format", choices=LOAD_FORMATS, default=default.load_format, help="dummy: random weights")
    group.add_argument("--dtype", choices=DTYPES, default=default.dtype, help="of the weights")
    group.add_argument("--kv-dtype", choices=KV_DTYPES, default=default.kv_dtype, help="of the KV cache")
    group.add_argument("--max-model-len", type=int, metavar="TOKENS", help="prompt and output of one request")
    group.add_argument("--max-num-seqs", type=int, default=default.max_num_seqs, help="requests that run together")
    group.add_argument(
        "--max-num-batched-tokens", type=int, metavar="TOKENS", help="per iteration; default 512, deterministic 64"
    )
    group.add_argument("--page-size", type=int, default=default.page_size, help="tokens per page of the KV cache")
    group.add_argument("--kv-cache-memory-bytes", type=int, metavar="BYTES", help="memory for the KV cache")
    group.add_argument("--gpu-memory-utilization", type=float, default=default.gpu_memory_utilization)
    group.add_argument("--seed", type=int, default=default.seed)
    group.add_argument("--mesh", default=default.mesh, help="devices, for example 'tp=3' or 'dp=2,tp=4'")
    group.add_argument("--device-offset", type=int, default=0, metavar="N", help="leave the first N devices to others")
    group.add_argument("--sharding-rules", default=default.sharding_rules, help="shipped name or a .toml file")
    group.add_argument("--max-decode-steps", type=int, default=default.max_decode_steps, help="iterations per dispatch")
    group.add_argument(
        "--deterministic", action="store_true", help="the same tokens alone and in any batch, bit by bit; slower"
    )
    group.add_argument(
        "--enable-prefix-caching", action=argparse.BooleanOptionalAction, default=default.enable_prefix_caching
    )
    group.add_argument(
        "--attention-backend",
        choices=ATTENTION_BACKENDS,
        default=default.attention_backend,
        help="auto: by the platform",
    )
    group.add_argument(
        "--matmul-backend", choices=MATMUL_BACKENDS, default=default.matmul_backend, help="auto: by the processor"
    )
    group.add_argument("--host-kv-bytes", type=int, default=0, metavar="BYTES", help="host memory for evicted KV pages")
    group.add_argument("--disk-kv-bytes", type=int, default=0, metavar="BYTES", help="disk space for KV pages")
    group.add_argument("--disk-kv-path", metavar="FOLDER", help="where they are kept, also for the next process")
    group.add_argument(
        "--preemption-mode", choices=PREEMPTION_MODES, default=default.preemption_mode,
        help="what becomes of the cache of a request that is pushed out: swap needs --host-kv-bytes",
    )  # fmt: skip
    group = parser.add_argument_group("several processes (docs/pods.md)")
    group.add_argument("--coordinator-address", metavar="HOST:PORT", help="of process 0")
    group.add_argument("--num-processes", type=int, metavar="N")
    group.add_argument("--process-id", type=int, metavar="I")
    group.add_argument("--distributed", action="store_true", help="take these from Slurm, GKE or the TPU slice")
    parser.add_argument("--json", action="store_true", help="print one JSON object on standard output")


def add_sampling_flags(parser: argparse.ArgumentParser, *, max_tokens: int) -> None:
    """The flags of `SamplingParams`."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--max-tokens", type=int, default=max_tokens)
    group.add_argument("--min-tokens", type=int, default=0)
    group.add_argument("--temperature", type=float, help="0 is greedy; default: the model's own, else 0")
    for name in ("top-p", "min-p", "presence-penalty", "frequency-penalty", "repetition-penalty"):
        group.add_argument(f"--{name}", type=float)
    group.add_argument("--top-k", type=int)
    group.add_argument("--n", type=int, default=1, help="completions per prompt")
    group.add_argument("--stop", action="append", metavar="TEXT", help="end at this text; may be repeated")
    group.add_argument("--ignore-eos", action="store_true", help="go on past end-of-sequence tokens")


def engine_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The engine's keywords among parsed arguments."""
    names = {field.name for field in dataclasses.fields(EngineConfig)}
    return {name: value for name, value in vars(args).items() if name in names}


def load_llm(args: argparse.Namespace) -> LLM:
    """Build the engine the flags describe; Ctrl-C ends its work between two iterations."""
    from jaxllm import LLM

    llm = LLM(**engine_arguments(args))
    llm.after_step = raise_if_interrupted
    return llm
