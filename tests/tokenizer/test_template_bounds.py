"""A hostile chat template is stopped: in time, in memory, and without reaching Python."""

from __future__ import annotations

import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import pytest

from jaxllm.tokenizer import template_budget
from jaxllm.tokenizer.chat_template import MAX_TEMPLATE_CHARS, ChatTemplate
from jaxllm.tokenizer.template_budget import TemplateLimitError
from tests.helpers.patience import slowness

MESSAGES = [{"role": "user", "content": "x" * 100}]


def render(source: str) -> str:
    return ChatTemplate(source, {}).render(MESSAGES)


@pytest.fixture
def small_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bounds, smaller, so that the tests are quick."""
    monkeypatch.setattr(template_budget, "MAX_STEPS", 50_000)
    monkeypatch.setattr(template_budget, "MAX_SECONDS", 0.3)


def doubling(assignment: str, end: str = "") -> str:
    """A template that doubles `ns.x` sixty times."""
    start = "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}"
    return start + assignment + "{% endfor %}" + end


SPINNING = {
    "nested loops that print nothing": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    ),
    "nested loops whose filter is never true": (
        "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}"
    ),
    "a macro that calls itself twice": (
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(40) }}"
    ),
    "a recursive loop that branches": (
        "{% for x in [1, 2] recursive %}{% if loop.depth < 40 %}{{ loop([1, 2]) }}{% endif %}{% endfor %}"
    ),
    "filters over long ranges": (
        "{% for i in range(9999) %}{% set x = range(99999) | map('string') | list %}{% endfor %}"
    ),
    "comparisons of long lists": (
        "{% set r = range(99999) | list %}{% for i in range(9999) %}{% set z = r == r[1:] %}"
        "{% set y = -1 in r %}{% endfor %}"
    ),
}
GROWING = {
    "repeated text": "{{ 'a' * 10**9 }}",
    "a repeated list": "{{ (range(9999) | list * 99999) | length }}",
    "doubling by tilde": doubling("{% set ns.x = ns.x ~ ns.x %}"),
    "doubling by plus": doubling("{% set ns.x = ns.x + ns.x %}"),
    "doubling by the method replace": doubling("{% set ns.x = ns.x.replace('a', 'aa') %}"),
    "doubling by the filter replace": doubling("{% set ns.x = ns.x | replace('a', 'aa') %}"),
    "doubling by the filter join": doubling("{% set ns.x = [ns.x, ns.x] | join %}"),
    "doubling by the method join": doubling("{% set ns.x = ns.x.join([ns.x, ns.x]) %}"),
    "doubling by capturing": doubling("{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}"),
    "nested lists": doubling("{% set ns.x = [ns.x, ns.x] %}", "{{ ns.x }}"),
    "nested objects": doubling("{% set ns.x = {'a': ns.x, 'b': ns.x} %}", "{{ ns.x | tojson }}"),
    "nested dict calls": doubling("{% set ns.x = dict(a=ns.x, b=ns.x) %}", "{{ ns.x | string }}"),
    "a long separator": "{{ range(9999) | list | join('x' * 99999) }}",
    "constant text in a loop": "{% for i in range(9999) %}" + "a" * 90_000 + "{% endfor %}",
    "captured constant text": "{% set x %}{% for i in range(9999) %}" + "a" * 90_000 + "{% endfor %}{% endset %}",
    "one heavy value many times": (
        "{% set h = range(999) | list %}{% set z = ([none] * 99) | map('default', h, true) | list %}{{ z == z[1:] }}"
    ),
}
REFUSED = {
    "one huge range": ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
    "a huge power": ("{{ 10**10**10 }}", "large numbers"),
    "repeated squares": (
        doubling("{% set ns.y = 99999 * 99999 * 99999 * 99999 * 99999**4 * 99999**8 %}"),
        "large",
    ),
    "padding": ("{{ 'a'.ljust(10**9) }}", "'ljust' of 'str' object is unsafe"),
    "padding of marked text": ("{{ (messages[0].content | safe).ljust(10**9) }}", "unsafe"),
    "a wide format": ("{{ '{:999999999}'.format(1) }}", "'format' of 'str' object is unsafe"),
    "a wide percent format": ("{{ '%999999999d' % 1 }}", "'%' on text is not allowed"),
    "a wide date": ("{{ strftime_now('%999999999d') }}", "plain date pattern"),
    "a wide indent": ("{{ 'a\n' | indent(10**9) }}", "use at most 16"),
    "a wide JSON indent": ("{{ [1] | tojson(indent=10**9) }}", "use at most 16"),
    "many bytes of a number": ("{{ (5).to_bytes(10**9) }}", "unsafe"),
    "a filter that fills": ("{{ [1] | batch(10**9, 0) | list }}", "No filter named 'batch'"),
    "generated text": ("{{ lipsum(n=10**9) }}", "'lipsum' is undefined"),
    "endless recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls itself without end"),
    "Python's object tree": ("{{ ''.__class__.__mro__ }}", "unsafe"),
    "globals of a function": ("{{ raise_exception.__globals__['re'] }}", "unsafe"),
    "an underscore in a namespace": ("{% set ns = namespace(_x=1) %}", "underscore"),
    "another file": ("{% include '/etc/hostname' %}", "includes another file"),
    "brackets without end": ("{{ " + "(" * 5000 + " }}", "does not compile"),
    "blocks without end": ("{% if 1 %}" * 300 + "{% endif %}" * 300, "does not compile"),
    "a syntax error": ("{% for %}", "does not compile"),
    "a huge template": ("a" * (MAX_TEMPLATE_CHARS + 1), "expected at most"),
}


@pytest.mark.parametrize("name", SPINNING)
def test_time_is_bounded_for(name: str, small_budget: None):
    start = time.thread_time()
    with pytest.raises(TemplateLimitError):
        render(SPINNING[name])
    assert time.thread_time() - start < 1.5 * slowness()


@pytest.mark.parametrize("name", GROWING)
def test_memory_is_bounded_for(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(template_budget, "MAX_CHARS", 4_000_000)
    monkeypatch.setattr(template_budget, "MAX_ITEMS", 20_000)
    tracemalloc.start()
    try:
        with pytest.raises(TemplateLimitError):
            render(GROWING[name])
        assert tracemalloc.get_traced_memory()[1] < 64e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line(name: str):
    source, message = REFUSED[name]
    with pytest.raises(ValueError, match=message) as caught:
        render(source)
    assert "\n" not in str(caught.value)


def test_charges_cannot_be_turned_off_from_inside(small_budget: None):
    source = "{% set tick = 1 %}{% set charge = 1 %}{% set measured = 1 %}{% set environment = 1 %}"
    with pytest.raises(TemplateLimitError):
        render(source + SPINNING["nested loops that print nothing"])


def test_trying_spellings_is_bounded_too(small_budget: None):
    spin = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    source = "{% for m in messages %}{% if m.content != 'x' %}" + spin + "{% endif %}{% endfor %}"
    calls = [{"id": str(n), "function": {"name": "f", "arguments": "{"}} for n in range(2)]
    messages = [
        {"role": "assistant", "tool_calls": calls},
        {"role": "tool", "content": [{"type": "text", "text": "x"}]},
    ]
    start = time.thread_time()
    with pytest.raises(TemplateLimitError):
        ChatTemplate(source, {}).render(messages)
    assert time.thread_time() - start < 3 * slowness()


def test_a_budget_is_for_one_rendering_only(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(template_budget, "MAX_STEPS", 1500)
    template = ChatTemplate("{% for i in range(1000) %}{% endfor %}ok", {})
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda _: template.render(MESSAGES), range(8))) == ["ok"] * 8


def test_a_long_conversation_is_well_within_the_bounds():
    source = (
        "{% set ns = namespace(kept=[]) %}"
        "{% for m in messages %}{% set ns.kept = ns.kept + [m] %}{% endfor %}"
        "{% for m in ns.kept %}{{ '<' ~ m.role ~ '>' + m.content.split('</think>')[-1] | trim }}{% endfor %}"
    )
    messages = [{"role": "user", "content": "word " * 100}] * 600
    assert len(ChatTemplate(source, {}).render(messages)) == 600 * len("<user>" + ("word " * 100).strip())
