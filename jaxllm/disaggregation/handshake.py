"""What two engines must agree on before pages of one mean anything to the other."""

from __future__ import annotations

from typing import Any

from jaxllm.disaggregation.wire import FORMAT
from jaxllm.kv.layout import PageLayout
from jaxllm.version import __version__

_WORDS = {
    "format": "the format of pages on the wire",
    "weights": "the model's weights and configuration",
    "kv_dtype": "kv_dtype",
    "num_layers": "the number of layers",
    "row": "what one token leaves in the cache",
}


def facts(engine_id: str, weights: str, layout: PageLayout, num_layers: int) -> dict[str, Any]:
    """One side's."""
    row = layout.row
    return {
        "engine_id": engine_id,
        "version": __version__,
        "format": FORMAT,
        "weights": weights,
        "kv_dtype": str(layout.dtype),
        "num_layers": num_layers,
        "row": [row.halves, row.heads, row.width],
    }


def mismatch(ours: dict[str, Any], theirs: dict[str, Any]) -> str | None:
    """What they disagree on, in a sentence, or None."""
    for name, words in _WORDS.items():
        if ours[name] != theirs.get(name):
            return (
                f"{words} differ: {_short(ours[name])} here, {_short(theirs.get(name))} there; start both servers with "
                "the same model, dtype and kv_dtype, and the same version of jaxllm"
            )
    return None


def _short(value: Any) -> str:
    return str(value)[:60]
