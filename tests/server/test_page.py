"""The built-in page in a real browser: answers stream in, charts move, nothing leaks or comes from elsewhere."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import httpx
import pytest

from jaxllm.server.routes.page import _FILES
from tests.server.browser import Browser, browser, find_chromium
from tests.server.live import KEY, Live

PAGE = files("jaxllm.server").joinpath("page")
needs_chromium = pytest.mark.skipif(find_chromium() is None, reason="no Chromium here")
# The API's answers, from the test: `feed(text)` sends a piece, `finish(reason)` ends the answer; `sent` are the bodies.
SCRIPTED = """
window.sent = []; window.streams = []; const real = window.fetch;
window.fetch = async (url, options) => {
  if (!String(url).endsWith("chat/completions")) return real(url, options);
  sent.push(JSON.parse(options.body));
  const body = new ReadableStream({ start(stream) {
    streams.push(stream);
    options.signal.addEventListener("abort", () => stream.error(new DOMException("", "AbortError")));
  } });
  return new Response(body, { headers: { "content-type": "text/event-stream" } });
};
window.say = (event) => streams.at(-1).enqueue(new TextEncoder().encode("data: " + JSON.stringify(event) + "\\n\\n"));
window.feed = (content, kind = "content") => say({ choices: [{ index: 0, delta: { [kind]: content } }] });
window.finish = (reason) => { say({ choices: [{ index: 0, delta: {}, finish_reason: reason }] });
  streams.at(-1).enqueue(new TextEncoder().encode("data: [DONE]\\n\\n")); streams.at(-1).close(); };
window.answer = () => (document.querySelector(".assistant:last-child")?.textContent ?? "").split(/[^\\S ]/).join("");
"""
ASK = """
window.ask = (text) => {
  document.getElementById("text").value = text; document.getElementById("form").requestSubmit();
};
"""
IDLE = "document.getElementById('send').textContent === 'Send'"


def test_page_refers_to_nothing_outside_and_runs_under_a_strict_policy():
    own = [name for name in _FILES if not name.startswith("vendor/")]
    text = "".join(PAGE.joinpath(name).read_text(encoding="utf-8") for name in [*own, "index.html"])
    assert not re.findall(r"https?://|//cdn|@import|innerHTML|insertAdjacent|eval\(|style=\"|<style|onclick=", text)


def test_every_file_of_the_page_is_served_and_no_other(live: Live):
    on_disk = {str(f.relative_to(str(PAGE))) for f in Path(str(PAGE)).rglob("*") if f.suffix in (".js", ".css")}
    assert on_disk == _FILES
    with httpx.Client(base_url=live.url, headers={"authorization": f"Bearer {KEY}"}) as http:
        for name in ("", *(f"page/{name}" for name in _FILES)):
            answer = http.get(f"/{name}")
            assert answer.status_code == 200
            assert "script-src 'self';" in answer.headers["content-security-policy"]
            assert "unsafe" not in answer.headers["content-security-policy"]
        for name in ("index.html", "../app.py", "..%2Fapp.py", "vendor/", "vendor/marked.LICENSE"):
            assert http.get(f"/page/{name}").status_code == 404
        assert httpx.get(f"{live.url}/page/main.js").status_code == 401


@pytest.mark.parametrize("name", ["marked", "purify"])
def test_licence_of_foreign_code_lies_beside_it(name: str):
    assert "Copyright" in PAGE.joinpath("vendor", f"{name}.LICENSE").read_text(encoding="utf-8")


@needs_chromium
def test_answer_streams_and_charts_move(live, tmp_path):
    # Point these at a real server for a picture worth looking at.
    url = os.environ.get("JAXLLM_PAGE_URL", live.url)
    picture = Path(os.environ.get("JAXLLM_PAGE_PNG", tmp_path / "page.png"))
    with browser(tmp_path / "profile") as tab:
        tab.open(url + "/", {"authorization": f"Bearer {KEY}"})
        tab.wait("document.querySelectorAll('canvas').length >= 5")
        tab.run("document.getElementById('max').value = 300; document.getElementById('temperature').value = 0")
        tab.run(f"{ASK} ask('Why is the sky blue?')")
        tab.wait("document.querySelector('.assistant')?.textContent.length > 3")
        tab.wait(IDLE, 60)
        assert len(tab.run("document.querySelector('.assistant').textContent")) > 10
        tab.wait("jaxllm.charts[0].points.some((v) => v > 0)")
        tab.wait("document.querySelectorAll('canvas').length >= 7")  # latencies have figures now
        assert "healthy" in tab.run("document.getElementById('state').textContent")
        assert tab.run("getComputedStyle(document.querySelector('canvas')).width") != "0px"
        tab.screenshot(picture)
        assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000
        assert not tab.console, tab.console


@pytest.fixture(scope="module")
def opened(live: Live, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as tab:
        tab.open(live.url + "/", {"authorization": f"Bearer {KEY}"})
        tab.wait("globalThis.jaxllm !== undefined")
        yield tab


def load(tab: Browser) -> None:
    tab.run("globalThis.jaxllm = undefined; location.reload()")
    tab.wait("globalThis.jaxllm !== undefined")
    tab.run(SCRIPTED + ASK)


@pytest.fixture
def tab(opened: Browser) -> Browser:
    """The page as at a first visit, its answers coming from the test."""
    for _ in range(2):  # a page that is left saves the answer it was waiting for
        opened.run("localStorage.clear()")
        load(opened)
    return opened


def answered(tab: Browser, question: str, text: str, reason: str = "stop") -> None:
    number = tab.run("sent.length")
    tab.run(f"ask({json.dumps(question)})")
    tab.wait(f"streams.length === {number + 1}")
    tab.run(f"feed({json.dumps(text)}); finish({json.dumps(reason)})")
    tab.wait(IDLE)


def bodies(tab: Browser) -> list[dict[str, Any]]:
    return json.loads(tab.run("JSON.stringify(sent)"))


@needs_chromium
def test_new_chat_while_text_streams_begins_empty_and_keeps_the_old_one(tab: Browser):
    tab.run("ask('first')")
    tab.wait("streams.length === 1")
    tab.run("feed('half an ans')")
    tab.wait("answer() === 'half an ans'")
    tab.run("document.getElementById('reset').click()")
    assert tab.run(IDLE) and tab.run("document.querySelectorAll('.message').length") == 0
    answered(tab, "second", "whole")
    assert [m["content"] for m in bodies(tab)[-1]["messages"]] == ["second"]
    tab.run("document.querySelectorAll('#list .open')[1].click()")
    assert tab.run("answer()") == "half an ansStopped."


@needs_chromium
def test_stopped_answer_stays_and_can_be_continued_or_made_anew(tab: Browser):
    tab.run("ask('count')")
    tab.wait("streams.length === 1")
    tab.run("feed('one, two')")
    tab.wait("answer() === 'one, two'")
    tab.run("document.getElementById('form').requestSubmit()")
    tab.wait("answer() === 'one, twoStopped.'")
    tab.run("document.querySelector('[data-label=continue]').click()")
    tab.wait("streams.length === 2")
    tab.run("feed(', three'); finish('stop')")
    tab.wait("answer() === 'one, two, three'")
    continued = bodies(tab)[1]
    assert continued["continue_final_message"] is True and continued["add_generation_prompt"] is False
    assert [m["content"] for m in continued["messages"]] == ["count", "one, two"]
    tab.run("document.querySelector('[data-label=regenerate]').click()")
    tab.wait("streams.length === 3")
    assert [m["content"] for m in bodies(tab)[2]["messages"]] == ["count"]


@needs_chromium
@pytest.mark.parametrize("reason", ["length", "stop"])
def test_cut_answer_says_so(tab: Browser, reason: str):
    tab.run("document.getElementById('max').value = 7")
    answered(tab, "q", "a", reason)
    assert tab.run("answer()") == ("aThe answer was cut at max tokens (7)." if reason == "length" else "a")


@needs_chromium
def test_reader_stays_where_the_reader_scrolled(tab: Browser):
    tab.run("ask('long')")
    tab.wait("streams.length === 1")
    tab.run("for (let i = 0; i < 200; i++) feed('line ' + i + '\\n\\n')")
    log = "document.getElementById('log')"
    tab.wait(f"{log}.scrollTop > 500")  # follows while nobody scrolls
    tab.run(f"{log}.scrollTop = 100")
    tab.wait("!document.getElementById('down').hidden")
    tab.run("for (let i = 0; i < 50; i++) feed('more ' + i + '\\n\\n'); finish('stop')")
    tab.wait(f"{IDLE} && answer().includes('more 49')")
    assert tab.run(f"{log}.scrollTop") == 100
    tab.run("document.getElementById('down').click()")
    assert tab.run(f"{log}.scrollHeight - {log}.scrollTop - {log}.clientHeight") < 2


HOSTILE = """# T

**b** `c` [ok](https://a.example) [bad](javascript:alert(1)) ![i](https://a.example/i.png)

<script>window.hacked = 1</script><img src=x onerror="window.hacked = 1"><a href="//a.example" style="color:red">x</a>

- [x] t

| a |
|---|
| 1 |

```py
<b>x</b>
```
"""


@needs_chromium
def test_markdown_is_shown_and_nothing_in_it_runs_or_loads(tab: Browser):
    answered(tab, "<b>q</b>", HOSTILE)
    count = {
        selector: tab.run(f"document.querySelectorAll('.assistant {selector}').length")
        for selector in (
            "h1",
            "strong",
            "td",
            "input[type=checkbox][disabled]",
            "pre > code",
            "script",
            "img",
            "[style]",
        )
    }
    assert list(count.values()) == [1, 1, 1, 1, 1, 0, 0, 0], count
    assert tab.run("document.querySelector('pre > code').textContent") == "<b>x</b>\n"
    assert tab.run("[...document.querySelectorAll('.assistant a')].map((a) => a.getAttribute('href'))") == [
        "https://a.example",
        None,
        "https://a.example/i.png",
    ]
    assert tab.run("document.querySelector('.user .body').textContent") == "<b>q</b>"
    assert "<script>" in tab.run("answer()")
    assert tab.run("window.hacked") is None


@needs_chromium
@pytest.mark.parametrize("inline", [False, True], ids=["field", "tags"])
def test_reasoning_is_folded_away_and_not_sent_back(tab: Browser, inline: bool):
    tab.run("ask('q')")
    tab.wait("streams.length === 1")
    tab.run(
        "feed('<think>hm, '); feed('well</think>\\n\\nyes')" if inline else "feed('hm, well', 'reasoning'); feed('yes')"
    )
    tab.run("finish('stop')")
    tab.wait(IDLE)
    assert tab.run("document.querySelector('.thinking').open") is False
    assert tab.run("document.querySelector('.thinking > div').textContent") == "hm, well"
    assert tab.run("document.querySelector('.assistant .body').textContent.trim()") == "yes"
    answered(tab, "and?", "no")
    assert [m["content"] for m in bodies(tab)[-1]["messages"]] == ["q", "yes", "and?"]


@needs_chromium
def test_conversations_and_settings_survive_a_reload(tab: Browser):
    tab.run(
        "for (const [id, v] of [['system', 'Rhyme.'], ['top_p', '0.5'], ['max', '9']]) {"
        "const e = document.getElementById(id); e.value = v; e.dispatchEvent(new Event('change')); }"
    )
    answered(tab, "first question", "first answer")
    tab.run("document.getElementById('reset').click()")
    answered(tab, "second question", "second answer")
    load(tab)
    titles = "[...document.querySelectorAll('#list .open')].map((b) => b.textContent)"
    assert tab.run(titles) == ["second question", "first question"]
    assert tab.run("answer()") == "second answer"
    answered(tab, "third", "x")
    body = bodies(tab)[-1]
    wanted = ["Rhyme.", "second question", "second answer", "third"]
    assert [m["content"] for m in body["messages"]] == wanted
    assert (body["top_p"], body["max_tokens"], "temperature" in body) == (0.5, 9, False)
    tab.run("document.querySelector('#list .delete').click()")
    load(tab)
    assert tab.run(titles) == ["first question"]


@needs_chromium
def test_enter_of_an_input_method_sends_nothing(tab: Browser):
    press = (
        "document.getElementById('text').dispatchEvent(new KeyboardEvent('keydown', "
        "{{ key: 'Enter', bubbles: true, cancelable: true, isComposing: {}, shiftKey: {} }}))"
    )
    tab.run("document.getElementById('text').value = 'にほん'")
    tab.run(press.format("true", "false"))
    tab.run(press.format("false", "true"))
    assert bodies(tab) == []
    tab.run(press.format("false", "false"))
    tab.wait("sent.length === 1")


@needs_chromium
def test_edited_message_replaces_what_followed_it(tab: Browser):
    answered(tab, "one", "1")
    answered(tab, "two", "2")
    tab.run("document.querySelector('[data-label=edit]').click()")
    assert tab.run("document.getElementById('text').value") == "one"
    answered(tab, "three", "3")
    assert [m["content"] for m in bodies(tab)[-1]["messages"]] == ["three"]
    assert tab.run("document.querySelectorAll('.message').length") == 2


@needs_chromium
def test_errors_are_shown_as_the_server_says_them(tab: Browser):
    answered(tab, "one", "1")
    tab.run("ask('two')")
    tab.wait("streams.length === 2")
    tab.run("feed('par'); say({ error: { message: 'the engine stopped' } })")
    tab.wait(IDLE)
    assert tab.run("answer()") == "parthe engine stopped"
    assert tab.run("getComputedStyle(document.querySelector('.note.bad')).display") == "block"
