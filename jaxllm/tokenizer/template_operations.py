"""The operators, filters, methods and globals a chat template may use, each bounded.

Inputs: values inside a rendering. Outputs: values, charged to the current budget. Filters and methods are
allow-lists: one that is missing here is an error that names it, never an unbounded operation.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
import string
from collections.abc import Callable
from typing import Any, NoReturn

from jinja2 import filters, pass_environment
from jinja2.exceptions import SecurityError
from jinja2.sandbox import safe_range
from jinja2.utils import Namespace
from markupsafe import Markup

from jaxllm.tokenizer.control_tokens import END, START
from jaxllm.tokenizer.template_budget import charge, measured, paid, printed_size, to_text, weigh
from jaxllm.tokenizer.template_errors import TemplateRefusal

_NOT_ASCII = re.compile(f"[^\\x00-\\x7f{START}{END}]")  # the marks of control_tokens.py stay as they are
_MAX_INDENT = 16
_MAX_BITS = 256
_SHIPPED_FILTERS = (
    *("abs", "capitalize", "count", "d", "default", "dictsort", "first", "float", "groupby", "int", "items"),
    *("last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "reverse", "round"),
    *("select", "selectattr", "sort", "sum", "title", "trim", "truncate", "unique", "upper", "wordcount"),
)
_STRING_METHODS = (
    *("capitalize", "casefold", "count", "endswith", "find", "index", "join", "lower", "lstrip", "partition"),
    *(
        "removeprefix",
        "removesuffix",
        "replace",
        "rfind",
        "rindex",
        "rpartition",
        "rsplit",
        "rstrip",
        "split",
    ),
    *("splitlines", "startswith", "strip", "swapcase", "title", "upper"),
    *("isalnum", "isalpha", "isascii", "isdecimal", "isdigit", "islower", "isnumeric", "isspace", "isupper"),
)
ALLOWED_METHODS: dict[type, frozenset[str]] = {
    str: frozenset(_STRING_METHODS),
    dict: frozenset(["copy", "get", "items", "keys", "values"]),
    list: frozenset(["copy", "count", "index"]),
    tuple: frozenset(["count", "index"]),
    **{kind: frozenset() for kind in (int, float, bytes, set, frozenset, range)},
}


def is_allowed_method(owner: Any, name: str) -> bool:
    """Whether a template may look up `name` on a value; objects of Jinja's own are judged by its sandbox."""
    lists = [names for kind, names in ALLOWED_METHODS.items() if isinstance(owner, kind)]
    return all(name in names for names in lists)


def binary_operation(operator: str, left: Any, right: Any) -> None:
    """Charge for `left operator right` before it happens, or refuse it."""
    if operator == "+" and isinstance(left, str) and isinstance(right, str):
        charge(1, len(left) + len(right))
    elif operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
        charge(1 + (len(left) + len(right)) // 8)
    elif operator == "%" and isinstance(left, str):
        raise SecurityError("'%' on text is not allowed in a chat template; use ~")
    elif operator == "*":
        _charge_product(left, right)
    elif operator == "**" and max(abs(float(left)), abs(float(right)) ** 4) > 2**16:
        raise SecurityError("'**' with large numbers is not allowed in a chat template")


def _charge_product(left: Any, right: Any) -> None:
    sized, times = (left, right) if hasattr(left, "__len__") else (right, left)
    if isinstance(sized, str):
        charge(1, len(sized) * max(int(times), 0))
    elif hasattr(sized, "__len__"):
        charge(weigh(sized) * max(int(times), 0))
    elif sum(v.bit_length() for v in (left, right) if isinstance(v, int)) > _MAX_BITS:
        raise SecurityError("'*' with large numbers is not allowed in a chat template")


def method_call(method: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Charge for the methods whose result may be larger than what they are given; returns the arguments."""
    text, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
    if isinstance(text, str) and name == "replace" and len(args) >= 2:
        old, new, *_ = args
        charge(1, text.count(old) * len(new))
    elif isinstance(text, str) and name == "join" and len(args) == 1:
        parts = list(args[0])  # a generator can be read only once
        charge(len(parts), sum(map(len, parts)) + len(parts) * len(text))
        return (parts,)
    return args


def join(environment: Any, value: Any, d: str = "", attribute: str | None = None) -> str:
    """Jinja's filter, charged before the text is made."""
    if attribute is not None:
        value = map(filters.make_attrgetter(environment, attribute), value)
    parts = [to_text(part) for part in value]
    charge(len(parts), len(parts) * len(d))
    return d.join(parts)


def replace(value: Any, old: str, new: str, count: int = -1) -> str:
    text = to_text(value)
    charge(1, text.count(old) * len(new))
    return text.replace(old, new, -1 if count is None else count)


def text_format(text: str) -> Callable[..., str]:
    """The method `format`, for fields without a width or a look-up: `{}`, `{0}`, `{name}`."""

    def formatted(*args: Any, **kwargs: Any) -> str:
        for _, name, specification, conversion in string.Formatter().parse(text):
            if specification or conversion or (name and not name.isalnum()):
                raise SecurityError("'format' of 'str' object is unsafe with more than a name in braces; use ~")
        args, kwargs = tuple(map(to_text, args)), {key: to_text(value) for key, value in kwargs.items()}
        charge(1, len(text) + text.count("{") * max(map(len, [*args, *kwargs.values()]), default=0))
        return text.format(*args, **kwargs)

    return formatted


def indent(value: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    text = to_text(value)
    size = width if isinstance(width, int) else len(width)
    _refuse_wide_indent(size)
    charge(1, (text.count("\n") + 1) * size)
    return filters.do_indent(text, width, first, blank)


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """JSON as models were trained on: unlike in Jinja's filter, non-ASCII and HTML characters stay."""
    _refuse_wide_indent(indent if isinstance(indent, int) else len(indent or ""))
    charge(*printed_size(value))
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    return _NOT_ASCII.sub(lambda found: json.dumps(found[0])[1:-1], text) if ensure_ascii else text


def safe(value: Any) -> str:
    """Text that Jinja does not escape. Added to other text it escapes that, which prompts have had in training."""
    return Markup(to_text(value))


def _refuse_wide_indent(width: int) -> None:
    if width > _MAX_INDENT:
        raise SecurityError(f"indent={width} in a chat template; use at most {_MAX_INDENT}")


def allowed_filters() -> dict[str, Callable[..., Any]]:
    own = {"join": pass_environment(join), "replace": replace, "indent": indent, "tojson": tojson}
    own |= {"string": to_text, "safe": safe}
    shipped = {name: filters.FILTERS[name] for name in _SHIPPED_FILTERS}
    return {name: _charged(function) for name, function in (shipped | own).items()}


def _charged(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)  # keeps the marks by which Jinja passes the environment
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        charge(1)
        return paid(function(*args, **kwargs))

    return wrapper


class BoundedNamespace(Namespace):
    """`namespace()`: no underscore names, and printing it shows no contents."""

    def __init__(self, **values: Any) -> None:
        super().__init__()
        for name, value in values.items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"namespace attribute {name!r} starts with an underscore; rename it")
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<namespace>"


def raise_exception(message: object) -> NoReturn:
    raise TemplateRefusal(str(message))


def strftime_now(pattern: str) -> str:
    if len(pattern) > 128 or re.search(r"%[^a-zA-Z%]*\d", pattern):  # a width such as %999999999d
        raise SecurityError("strftime_now takes a plain date pattern of at most 128 characters")
    return datetime.datetime.now().strftime(pattern)


def bounded_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return measured(dict(*args, **kwargs))


GLOBALS: dict[str, Any] = {
    "range": safe_range,
    "dict": bounded_dict,
    "namespace": BoundedNamespace,
    "raise_exception": raise_exception,
    "strftime_now": strftime_now,
}
