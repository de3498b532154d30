"""What papers report, on the engine's own scheduler and modelled devices: `python scripts/headlines.py [NAME ...]`.

Each function sets up what a paper compared and prints the highest rates at which both sides hold the same limit.
`docs/simulation.md` has the papers' numbers, these, and why they differ.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.config import EngineConfig, ModelConfig
from jaxllm.families import read_config
from jaxllm.families.presets import preset
from jaxllm.roofline.chips import CHIPS, PCIE_GEN5
from jaxllm.scheduling.request import Request
from jaxllm.simulation.arrivals import Arrival, at_rate, for_models, random_arrivals, trace_arrivals
from jaxllm.simulation.clock import VirtualClock
from jaxllm.simulation.disaggregated import Disaggregated, link_bandwidth
from jaxllm.simulation.fleet import Colocated, Fleet, Results, simulate
from jaxllm.simulation.paper_engine import Hardware, PaperEngine, Policy, paper_engine
from jaxllm.simulation.policies import POLICIES, hand_over, reserving
from jaxllm.simulation.pooled import Pooled
from jaxllm.simulation.report import weighted_percentiles
from jaxllm.simulation.run import bisect

Holds = Callable[[Results], bool]
Workload = Callable[[int], Iterator[Arrival]]
Make = Callable[[], Fleet]


def settings(**given: Any) -> dict[str, Any]:
    """Engine settings."""
    return given


def decoder(hidden: int, layers: int, heads: int, positions: int = 2048) -> ModelConfig:
    """A decoder of GPT-3's and OPT's kind."""
    return read_config(
        {
            "architectures": ["GPT2LMHeadModel"],
            "vocab_size": 50272,
            "n_positions": positions,
            "n_embd": hidden,
            "n_layer": layers,
            "n_head": heads,
        }
    )


def engine(
    cfg: ModelConfig, chip: str, policy: Policy | None = None, clock: VirtualClock | None = None, **sizes: Any
) -> PaperEngine:
    """One engine on paper."""
    config = EngineConfig(**settings(max_num_seqs=64, max_num_batched_tokens=512) | sizes)
    return paper_engine(config, cfg, Hardware(chip=CHIPS[chip]), policy=policy, clock=clock)


def together(cfg: ModelConfig, chip: str, policy: Policy | None = None, count: int = 1, **sizes: Any) -> Make:
    """So many engines that do all of a request."""
    return lambda: Colocated([engine(cfg, chip, policy, **sizes) for _ in range(count)])


def apart(cfg: ModelConfig, chip: str, prefill: int, decode: int, link: str, **sizes: Any) -> Make:
    """So many engines that prefill, and that decode."""
    return lambda: Disaggregated(
        [engine(cfg, chip, **sizes) for _ in range(prefill)],
        [engine(cfg, chip, hand_over, **sizes) for _ in range(decode)],
        bytes_per_s=link_bandwidth(link, CHIPS[chip]),
    )


def capacity(
    make: Make, workload: Workload, holds: Holds, *, first: float = 1.0, seconds: float = 40, most: int = 3000
) -> float:
    """The highest rate (requests/s) that holds, by doubling and bisection.

    Arrivals last `seconds`, if that makes at least 150 requests and at most `most`, and ten times the limit of TTFT:
    few requests would be served within it however soon they came.
    """
    if isinstance(holds, Within):
        seconds = max(seconds, 10 * holds.slo["ttft"])

    def ok(rate: float) -> bool:
        count = int(np.clip(seconds * rate, 150, most))

        def is_lost(results: Results, now: float) -> bool:
            return isinstance(holds, Within) and holds.is_lost(results, now, count)

        results = simulate(make(), at_rate(workload(count), rate), is_lost=is_lost)
        return not results.gave_up and holds(results)

    rate = first
    while not ok(rate):
        rate /= 2
        if rate < first / 256:
            return 0.0
    while ok(2 * rate):
        rate *= 2
    return bisect(ok, rate, 2 * rate)


def lengths(prompt: tuple[int, int], output: tuple[int, int]) -> Workload:
    """Uniform lengths."""

    def made(count: int) -> Iterator[Arrival]:
        random = np.random.default_rng(0)
        for number in range(count):
            yield Arrival(0.0, int(random.integers(*prompt)), int(random.integers(*output)), number=number)

    return made


def chat(prompt: int, output: int, most: int, spread: float = 0.8) -> Workload:
    """Log-normal lengths of these medians, cut so that both together fit."""

    def made(count: int) -> Iterator[Arrival]:
        for one in random_arrivals(count, prompt, output, spread=spread):
            size = min(one.input_len, 3 * most // 4)
            yield dataclasses.replace(one, input_len=size, output_len=max(2, min(one.output_len, most - size)))

    return made


def normalised_latency(limit: float, at: float = 50) -> Holds:
    """Seconds of a request per token that it generates."""
    return lambda results: bool(np.percentile([o.e2e / o.num_tokens for o in results.outcomes], at) <= limit)


def mean_latency(limit: float) -> Holds:
    """The same, on average."""
    return lambda results: bool(np.mean([o.e2e / o.num_tokens for o in results.outcomes]) <= limit)


@dataclasses.dataclass(frozen=True)
class Within:
    """Enough requests meet an SLO."""

    slo: dict[str, float]
    share: float = 0.9

    def __call__(self, results: Results) -> bool:
        return bool(np.mean([outcome.meets(self.slo) for outcome in results.outcomes]) >= self.share)

    def is_lost(self, results: Results, now: float, count: int) -> bool:
        """Whether too many of `count` have missed it already."""
        return sum(outcome.has_missed(self.slo, now) for outcome in results.outcomes) > (1 - self.share) * count


def orca() -> dict[str, float]:
    """Batches per iteration against batches per request, of any size: GPT-3 175B on 16 A100.

    At 1.9 times the latency of an idle one, where the paper's 190 ms per token stand in its figure. Then as the paper
    has it, a pipeline of two stages on 8 devices each: one batch leaves one of the stages idle at any time, so that
    it is as fast as an engine on 8 devices, where two that alternate are as fast as two of these.
    """
    cfg, load = decoder(12288, 96, 96), lengths((32, 513), (1, 129))
    found = dict[str, float]()
    for name, mesh, engines in (("", "tp=16", 1), (", two stages", "tp=8", 2)):
        sizes = settings(mesh=mesh, max_num_batched_tokens=20000)

        def make(policy: str, most: int, count: int = 1, sizes: dict[str, Any] = sizes) -> Make:
            return together(cfg, "a100", POLICIES[policy], count, max_num_seqs=most, **sizes)

        idle = simulate(make("unchunked", 1)(), at_rate(load(40), 0.01))
        limit = 1.9 * float(np.median([outcome.e2e / outcome.num_tokens for outcome in idle.outcomes]))
        holds = normalised_latency(limit)
        static = max(capacity(make("static", most), load, holds) for most in (1, 2, 4, 8, 16))
        iterations = capacity(make("unchunked", 32, engines), load, holds)
        found |= {f"limit, ms{name}": 1e3 * limit, f"static{name}": static, f"unchunked{name}": iterations}
        found[f"ratio{name}"] = iterations / static
    return found


def sarathi() -> dict[str, float]:
    """Chunks against prefill first: Mistral-7B on one A100, 99% of the gaps between tokens below 100 ms."""
    cfg, load = dataclasses.replace(preset("mistral-7b"), local=None), chat(1730, 415, 8192)

    def holds(results: Results) -> bool:
        waits = np.median([outcome.ttft for outcome in results.outcomes])
        return bool(waits <= 2.0 and (weighted_percentiles(*results.gaps.weighted())["p99"] or 0) <= 100)

    found = {}
    for name, budget in (("prefill-first", 8192 + 128), ("chunked", 512)):
        sizes = settings(max_num_seqs=128, max_num_batched_tokens=budget, max_model_len=8192)
        make = together(cfg, "a100", POLICIES[name], **sizes)
        found[name] = capacity(make, load, holds, first=0.5, seconds=60, most=400)
    return found | {"ratio": found["chunked"] / max(found["prefill-first"], 1e-9)}


def paged_attention() -> dict[str, float]:
    """Pages against contiguous room: OPT-13B with 12 GB of cache, 0.2 s per token on average."""
    cfg, load = decoder(5120, 40, 40), chat(161, 338, 2048)

    def power_of_two(request: Request) -> int:
        return request.num_prompt + (1 << (request.limit - request.num_prompt - 1).bit_length())

    policies = {
        "paged": None,
        "max": POLICIES["contiguous"],
        "pow2": reserving(power_of_two),
        "oracle": reserving(lambda request: request.limit),
    }
    sizes = settings(max_num_seqs=256, max_num_batched_tokens=2048, kv_cache_memory_bytes=12 * 10**9)
    found = {
        name: capacity(together(cfg, "a100", policy, **sizes), load, mean_latency(0.2), seconds=150)
        for name, policy in policies.items()
    }
    return found | {f"paged/{name}": found["paged"] / found[name] for name in ("max", "pow2", "oracle")}


def distserve() -> dict[str, float]:
    """Prefill and decode apart against together, per device, as the paper's artefact sets them up.

    OPT-13B and 66B on A100; limits, devices and the baseline's batch (65,536 tokens, prompts first) are those of its
    scripts, lengths are log-normal about the data sets' averages; a decode pipeline of 2 x 2 devices is here tp=4.
    """
    small, large = decoder(5120, 40, 40), decoder(9216, 64, 72)
    cases = {
        "13B ShareGPT": (small, chat(550, 145, 2048), {"ttft": 0.25, "tpot": 0.1}, ("tp=1", "tp=2", "tp=1")),
        "66B ShareGPT": (large, chat(550, 145, 2048), {"ttft": 0.4, "tpot": 0.1}, ("tp=4", "tp=4", "tp=4")),
        "66B HumanEval": (large, chat(150, 85, 2048, 0.5), {"ttft": 0.125, "tpot": 0.2}, ("tp=4", "tp=4", "tp=4")),
        "66B LongBench": (large, chat(1600, 80, 2048, 0.4), {"ttft": 15.0, "tpot": 0.15}, ("tp=4", "tp=4", "tp=4")),
    }
    found = {}
    for name, (cfg, load, slo, meshes) in cases.items():
        whole, prefill, decode = (int(mesh[3:]) for mesh in meshes)
        sizes = settings(max_num_seqs=256, max_model_len=2048)
        first = settings(max_num_batched_tokens=65536, mesh=meshes[0]) | sizes
        makers = {
            "prefill-first": (together(cfg, "a100", POLICIES["prefill-first"], **first), whole),
            "chunked": (together(cfg, "a100", **first | settings(max_num_batched_tokens=512)), whole),
            "apart": (pools(cfg, meshes[1], meshes[2], max_num_batched_tokens=2048 + 256, **sizes), prefill + decode),
        }
        holds = Within(slo)
        rates = {kind: capacity(make, load, holds) / devices for kind, (make, devices) in makers.items()}
        found |= {f"{name}, {kind}": rate for kind, rate in rates.items()}
        found[f"{name}, ratio"] = rates["apart"] / max(rates["prefill-first"], 1e-9)
    return found


def pools(cfg: ModelConfig, prefill: str, decode: str, **sizes: Any) -> Make:
    """One engine that prefills and one that decodes, on these meshes."""
    return lambda: Disaggregated(
        [engine(cfg, "a100", mesh=prefill, **sizes)],
        [engine(cfg, "a100", hand_over, mesh=decode, **sizes)],
        bytes_per_s=link_bandwidth("nvlink", CHIPS["a100"]),
    )


def mooncake(traces: Path | None) -> dict[str, float]:
    """Pools and shared prefixes against engines that do all: Llama-3.1-70B on 4 nodes of 8 A100, a trace of Kimi."""
    if traces is None:
        raise ValueError("mooncake needs --traces: a folder with mooncake_conversation.jsonl")
    cfg, first = preset("llama-3.1-70b"), POLICIES["prefill-first"]
    sizes = settings(mesh="tp=8", max_num_seqs=64, max_num_batched_tokens=8192)
    whole = sizes | {"max_num_batched_tokens": 131072 + 64}
    makers = {
        "prefill-first, no prefixes": together(cfg, "a100", first, 4, **whole, enable_prefix_caching=False),
        "prefill-first": together(cfg, "a100", first, 4, **whole),
        "chunked": together(cfg, "a100", None, 4, **sizes | {"max_num_batched_tokens": 1024}),
        "pools, 3 + 1": apart(cfg, "a100", 3, 1, "hdr", **sizes),
        "pools, 2 + 2": apart(cfg, "a100", 2, 2, "hdr", **sizes),
    }

    def load(count: int) -> Iterator[Arrival]:
        return trace_arrivals(traces / "mooncake_conversation.jsonl", count, 131072)

    holds = Within({"ttft": 30.0, "tpot": 0.1})
    return {name: capacity(make, load, holds) for name, make in makers.items()}


def aegaeon() -> dict[str, float]:
    """Switching between tokens against between requests: 24 models of 7B on 4 H100, TTFT 10 s, 100 ms per token."""
    cfg, load = preset("llama-2-7b"), chat(300, 600, 4096)
    weights = dict.fromkeys([f"m{i}" for i in range(24)], 2.0 * cfg.num_parameters)
    sizes = settings(max_num_seqs=32, max_num_batched_tokens=2048, kv_cache_memory_bytes=16 << 30)
    holds, found = Within({"ttft": 10.0, "tpot": 0.1}), dict[str, float]()

    def pool(policy: str) -> Make:
        def make_engine(_: str, clock: VirtualClock) -> PaperEngine:
            return engine(cfg, "h100", clock=clock, **sizes)

        return lambda: Pooled(weights, make_engine, num_instances=4, policy=policy, bytes_per_s=0.8 * PCIE_GEN5)

    for policy in ("token", "request"):
        found[policy] = capacity(pool(policy), lambda count: for_models(load(count), list(weights)), holds)
    return found | {"ratio": found["token"] / found["request"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = ("orca", "sarathi", "paged_attention", "distserve", "mooncake", "aegaeon")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(names))
    parser.add_argument("--traces", type=Path, help="folder of the public traces, for mooncake")
    args = parser.parse_args()
    if unknown := set(args.names) - set(names):
        parser.error(f"no headline {min(unknown)!r}; there are {', '.join(names)}")
    for name in args.names or names:
        found = mooncake(args.traces) if name == "mooncake" else globals()[name]()
        print(json.dumps({name: {key: round(value, 3) for key, value in found.items()}}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
