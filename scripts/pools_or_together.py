"""Where prefill and decode apart beat engines that do both: two traces under two limits, drawn beside each other.

    python scripts/pools_or_together.py --traces FOLDER --plot docs/pools_or_together.png

For each trace and limit the best deployment of either kind for llama-3.1-70b on 16 H100, as `jaxllm simulate --search`
finds it: the highest rate per device at which nine of ten requests meet the limit.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from jaxllm.simulation.config import SimulationConfig
from jaxllm.simulation.plot import check_plot
from jaxllm.simulation.run import set_up
from jaxllm.simulation.search import name_of, search

TRACES = {
    "chat (Azure): 1,155 in, 211 out": ("azure_llm_2023_conv.csv", "ttft:2s"),
    "long contexts (Mooncake): 12,035 in, 343 out": ("mooncake_conversation.jsonl", "ttft:10s"),
}
LIMITS = ("tpot:25ms", "tpot:100ms")
KINDS = {"together": "tab:blue", "apart": "tab:orange"}


def best_of_each_kind(folder: Path, trace: str, limits: str, model: str, num_devices: int) -> dict[str, dict[str, Any]]:
    """The best deployment that does all in one place, and the best in two."""
    sim = SimulationConfig(
        trace=str(folder / trace), slo=limits, search=True, num_devices=num_devices, skip_longer=True
    )
    rows = search(set_up({"model": model, "max_num_seqs": 128}, sim, progress=False))["search"]
    found = {}
    for row in rows:  # the best first
        found.setdefault("together" if "mesh" in row else "apart", row)
    return found


def draw(found: dict[tuple[str, str], dict[str, dict[str, Any]]], path: Path) -> None:
    """Bars per trace and limit, each with its deployment."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), dpi=100, layout="constrained")
    panels = figure.subplots(1, len(TRACES))
    for axes, trace in zip(panels, TRACES, strict=True):
        for at, limit in enumerate(LIMITS):
            for shift, (kind, color) in zip((-0.2, 0.2), KINDS.items(), strict=True):
                row = found[trace, limit].get(kind)
                if row is None:
                    continue
                label = kind if at == 0 else None
                axes.bar(at + shift, row["goodput_per_device"], 0.38, color=color, label=label)
                words = name_of(row).replace(", ", "\n").replace(" -> ", "\n-> ")
                axes.text(at + shift, row["goodput_per_device"], words, ha="center", va="bottom", fontsize=7)
        ttft = TRACES[trace][1]
        axes.set(title=trace, ylabel="requests/s per device within the SLO")
        axes.set_xticks(range(len(LIMITS)), [f"{ttft}, {limit}" for limit in LIMITS])
        axes.margins(y=0.2)
        axes.legend(loc="upper left")
    figure.savefig(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--traces", type=Path, required=True, help="folder of the public traces")
    parser.add_argument("--plot", type=Path, required=True, metavar="FILE.png")
    parser.add_argument("--model", default="llama-3.1-70b")
    parser.add_argument("--num-devices", type=int, default=16, help="of H100")
    parser.add_argument("--jobs", type=int, default=2, help="searches at the same time")
    args = parser.parse_args()
    check_plot(args.plot)
    cases = list(itertools.product(TRACES, LIMITS))
    found = {}
    with ProcessPoolExecutor(args.jobs) as pool:
        running = []
        for trace, limit in cases:
            file, ttft = TRACES[trace]
            found_by = args.traces, file, f"{ttft},{limit}", args.model, args.num_devices
            running.append(pool.submit(best_of_each_kind, *found_by))
        for case, work in zip(cases, running, strict=True):
            found[case] = work.result()
            rates = {k: {"rate": round(r["goodput_per_device"], 3), "as": name_of(r)} for k, r in found[case].items()}
            print(
                json.dumps({"trace": TRACES[case[0]][0], "slo": f"{TRACES[case[0]][1]},{case[1]}"} | rates), flush=True
            )
    draw(found, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
