"""Write docs/config_fields.md: what becomes of each field of a config.json, from the rules that the families read.

`python scripts/config_fields.py` writes it; a test compares it with the rules and the rules with transformers.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from jaxllm.families.architecture_fields import RULES
from jaxllm.families.field_rules import FOREIGN, HARMLESS, FieldRules, Values

FILE = Path(__file__).parents[1] / "docs" / "config_fields.md"

_HEAD = """\
# Fields of config.json

Made by `python scripts/config_fields.py`; tests compare these lists with the configuration classes of the installed
transformers, field by field.

- **Computed**: read, and every value that makes sense is computed as transformers computes it. Names in brackets are
  not declared by transformers' class but asked for by its model code.
- **Harmless**: no value changes what a forward pass computes. Those of all architectures are listed once, below.
- **Refused unless**: computed with these values only; null always passes. Anything else is refused in one line.
- Any other field is one that transformers does not know: it cannot change the reference's numbers, and is ignored
  with one line in the log that names it.

Spellings are brought together as transformers 5 does it. `rope_scaling` (older) replaces `rope_parameters` (newer)
whole, its `rope_theta` included (a warning says so); Gemma 3 and OLMo 3 add it to the parameters of their global
layers. A `rope_theta` beside them fills in where they have none. A field that is missing has transformers' default,
except for sizes, which are required. Without `architectures`, `model_type` decides.

Tensors are found with or without the prefix `model.` (`transformer.` in GPT-2). With `tie_word_embeddings: true` and
an `lm_head.weight` in the file, the two tables are compared as in transformers 5: equal ones are tied, otherwise the
file's own head is used. Layers that predict several tokens at once are left out. Both are said in the log.
"""


def table() -> str:
    """The document."""
    parts = [
        _HEAD,
        "## Every architecture",
        "",
        f"Harmless: {_names(HARMLESS)}",
        "",
        f"Refused unless: {_values(FOREIGN)}",
    ]
    for architecture, rules in RULES.items():
        parts += [
            "",
            f"## {architecture}",
            "",
            f"`{rules.config_class}`, model_type `{rules.model_type}`",
            "",
            *_rows(rules),
        ]
    return "\n".join(parts) + "\n"


def _rows(rules: FieldRules) -> Iterable[str]:
    undeclared = ", ".join(f"[`{name}`]" for name in sorted(rules.undeclared))
    yield "| | |"
    yield "| --- | --- |"
    yield f"| Computed | {', '.join(filter(None, (_names(rules.computed), undeclared)))} |"
    if rules.harmless:
        yield f"| Harmless | {_names(rules.harmless)} |"
    if rules.neutral or rules.foreign:
        yield f"| Refused unless | {_values({**rules.neutral, **rules.foreign})} |"
    if rules.defaults:
        yield f"| Where missing | {', '.join(f'`{k}`: {_json(v)}' for k, v in sorted(rules.defaults.items()))} |"
    if rules.spellings:
        names = ", ".join(f"`{other}` for `{name}`" for other, name in sorted(rules.spellings.items()))
        yield f"| Other names | {names} |"


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names))


def _values(values: Values) -> str:
    return ", ".join(f"`{name}` {' or '.join(map(_json, some)) or 'null'}" for name, some in sorted(values.items()))


def _json(value: object) -> str:
    return {True: "true", False: "false"}.get(value, str(value)) if isinstance(value, bool) else str(value)


if __name__ == "__main__":
    FILE.write_text(table(), encoding="utf-8")
