"""`jaxllm plan`: flags in; what fits on a TPU slice and how fast it could be, as text or one JSON object, out."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from jaxllm.commands.flags import add_engine_flags, engine_arguments
from jaxllm.config import EngineConfig

HELP = "Check a deployment on a TPU slice that is not there, by compiling for it."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the command."""
    group = parser.add_argument_group("plan")
    group.add_argument("--topology", required=True, help="a TPU slice: v5e:4x4, v6e:2x4, v5p:2x2x4, ...")
    group.add_argument("--context", type=int, metavar="TOKENS", help="in every row's cache, for the decode bound")
    group.add_argument("--search", action="store_true", help="rank the legal meshes and rule files by arithmetic")
    group.add_argument("--search-compile", type=int, default=0, metavar="N", help="also compile the best N of them")
    add_engine_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Print the plan; 1 where it does not fit. Raises ValueError with one line that says what to change."""
    from jaxllm.deployment.topology import parse_topology, prepare_environment

    if args.context is not None and args.context < 1:
        raise ValueError(f"--context is {args.context}; it must be at least 1")
    if args.search_compile < 0:
        raise ValueError(f"--search-compile is {args.search_compile}; it must be at least 0")
    parse_topology(args.topology)
    prepare_environment()  # before anything loads JAX
    config = EngineConfig(**engine_arguments(args))
    if args.search or args.search_compile:
        from jaxllm.deployment.search import search

        found = search(config, args.topology, context=args.context, compile_best=args.search_compile)
        print(json.dumps(found) if args.json else format_search(found))
        return 0 if any(c["fits"] for c in found["candidates"]) else 1
    from jaxllm.deployment.plan import make_plan

    print(f"jaxllm: compiling {config.model} for {args.topology}", file=sys.stderr, flush=True)
    plan = make_plan(config, args.topology, context=args.context)
    print(json.dumps(plan) if args.json else format_plan(plan))
    return 0 if plan["fits"] else 1


def format_plan(plan: dict[str, Any]) -> str:
    """For a person."""
    mesh = ",".join(f"{axis}={size}" for axis, size in plan["mesh"].items())
    spent = plan["bytes_per_device"]
    total = spent["parameters"] + spent["kv_pages"] + spent["temporaries"]
    lines = [
        f"{plan['model']} on {plan['topology']} ({plan['num_devices']} devices, mesh {mesh}, rules "
        f"{plan['sharding_rules']}): {'fits' if plan['fits'] else 'does not fit'}",
        "",
        f"{'bytes per device':<22}{'GB':>9}",
        *(f"  {name.replace('_', ' '):<20}{spent[name] / 1e9:>9.3f}" for name in spent if name != "limit"),
        f"  {'together':<20}{total / 1e9:>9.3f}",
        f"  {'may use':<20}{plan['budget_per_device'] / 1e9:>9.3f} of {spent['limit'] / 1e9:.3f}",
    ]
    lines += _fits(plan) if plan["fits"] else _too_big(plan)
    lines += [
        "",
        f"lower bounds, {plan['max_num_seqs']} rows at {plan['context']:,} tokens of context, chunks of "
        f"{plan['prefill_tokens']:,} tokens",
    ]
    for phase, by in (("decode", plan["bound_by"]), ("prefill", plan["bound_by_prefill"])):
        terms = ", ".join(f"{name} {ms:.3g}" for name, ms in plan["terms_ms"][phase].items())
        lines.append(f"  {phase:<8}{plan['lower_bound_ms'][phase]:>9.3f} ms, bound by {by:<12} ({terms})")
    lines += [f"note: {note}" for note in plan["notes"]]
    return "\n".join(lines)


def _fits(plan: dict[str, Any]) -> list[str]:
    requests = plan["kv_tokens"] // max(1, plan["max_model_len"])
    lines = [
        f"KV cache: {plan['kv_tokens']:,} tokens in {plan['num_pages']:,} pages, "
        f"{requests} requests of {plan['max_model_len']:,} tokens",
        f"the same on the slice: --kv-cache-memory-bytes {plan['kv_cache_memory_bytes']}",
        f"compiled in {plan['compile_seconds']:.1f} s; the programs take {plan['program_bytes'] / 1e9:.3f} GB more",
    ]
    for phase, counts in plan["collectives"].items():
        some = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
        lines.append(f"collectives of one {phase} iteration: {some or 'none'}")
    if plan["copies_pages"]:
        lines.append("the compiler copies pages between layouts: temporaries grow with the cache")
    return lines


def _too_big(plan: dict[str, Any]) -> list[str]:
    over = plan["too_big"]
    lines = [f"too big: {over['what']}, {over['bytes_over'] / 1e9:.3f} GB over"]
    return lines + [f"would fit: {change}" for change in plan["would_fit"]]


def format_search(found: dict[str, Any]) -> str:
    """For a person: candidates by arithmetic, then the plans that were compiled."""
    lines = [
        f"{found['model']} on {found['topology']}: {len(found['candidates'])} legal pairs, collectives not counted",
        f"{'rules':<16}{'mesh':<20}{'fits':>5}{'GB/device':>11}{'KV tokens':>12}{'decode ms':>11}  bound by",
    ]
    for c in found["candidates"]:
        lines.append(
            f"{c['sharding_rules']:<16}{c['mesh']:<20}{'yes' if c['fits'] else 'no':>5}{c['parameters'] / 1e9:>11.3f}"
            f"{c['kv_tokens']:>12,}{c['lower_bound_ms']:>11.3f}  {c['bound_by']}"
        )
    for plan in found["plans"]:
        lines += ["", format_plan(plan)]
    return "\n".join(lines)
