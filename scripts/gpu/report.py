"""What the parts found, for machines and for people."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any


def describe_device() -> dict[str, Any]:
    """Names and versions, and the data sheet, if there is one."""
    code = (
        "import jax, json; d = jax.devices()[0]; "
        "print(json.dumps({'kind': d.device_kind, 'platform': d.platform, 'jax': jax.__version__}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    device = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"kind": "unknown"}
    from jaxllm.roofline.chips import chip_of_device

    chip = chip_of_device(device["kind"])
    sheet = chip and {"bytes_per_s": chip.bandwidth, "flops_per_s": chip.flops}
    return device | {"sheet": sheet}


def add_fractions(report: dict[str, Any]) -> None:
    """MBU and MFU of every row that has rates, of what this device was seen to do and of its data sheet."""
    ceilings_rows = report["parts"].get("ceilings", {}).get("rows", [])
    bases = {"measured": ceilings_rows[0] if ceilings_rows else None, "sheet": report["device"].get("sheet")}
    for name in ("attention", "engine", "engine8", "engine4", "products"):
        for row in report["parts"].get(name, {}).get("rows", []):
            for base, ceiling in bases.items():
                for fraction, rate in (("mbu", "bytes_per_s"), ("mfu", "flops_per_s")):
                    if ceiling and rate in row:
                        row[f"{fraction}_of_{base}"] = round(row[rate] / ceiling[rate], 4)


def markdown(report: dict[str, Any]) -> str:
    """The report for people."""
    device, parts = report["device"], report["parts"]
    lines = [f"# {device['kind']}, JAX {device.get('jax')}, {report['seconds']:.0f} s in all\n"]
    for row in parts.get("ceilings", {}).get("rows", []):
        lines.append(f"Copy {row['bytes_per_s'] / 1e12:.2f} TB/s, bf16 GEMM {row['flops_per_s'] / 1e12:.0f} TFLOP/s.")
    checked = parts.get("kernels", {}).get("rows", [])
    if checked:
        bad = [row["shape"] for row in checked if not row["ok"]]
        lines.append(
            f"Kernel against oracle: {sum(r['cases'] for r in checked)} cases of {len(checked)} shapes, worst error "
            f"{max(r['error'] for r in checked):.1e}, {len(bad)} shapes beyond tolerance {bad[:5]}."
        )
    for name in ("engine", "engine8", "engine4", "products", "offline", "peer", "attention"):
        if rows := parts.get(name, {}).get("rows"):
            lines += ["", f"## {name}", *table(rows)]
    notes = [f"* {name}: {part['note']}" for name, part in parts.items() if "note" in part]
    return "\n".join([*lines, "", *notes, ""])


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Rows as a Markdown table over all their keys."""
    keys = list(dict.fromkeys(key for row in rows for key in row))

    def cell(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.3g}" if abs(value) < 1e5 else f"{value:.3e}"
        return str(value)

    body = ["| " + " | ".join(cell(row.get(key, "")) for key in keys) + " |" for row in rows]
    return ["| " + " | ".join(keys) + " |", "|" + " --- |" * len(keys), *body]
