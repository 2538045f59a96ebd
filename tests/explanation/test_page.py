"""The page of `quill explain --html` in a real browser, and what its source may contain."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browsing import PHONE, WIDE, Axe, new_context

from quill.config.settings import SampleConfig
from quill.explanation import page
from quill.explanation.explanation import Explanation

PROMPT = "</script><b>a tide</b>\n"

Open = Callable[..., Any]


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Iterator[Open]:
    """Open an explanation in a window of its own; fails if the page errs or asks for anything."""
    contexts, wrong = [], []

    def open_page(explained: Explanation, *, viewport: dict[str, int] = WIDE, **options: Any) -> Any:
        path = tmp_path / "page.html"
        path.write_text(explained.html(), encoding="utf-8")
        context = new_context(browser, viewport=viewport, **options)
        contexts.append(context)
        window = context.new_page()
        window.on("console", lambda message: wrong.append(message.text))
        window.on("pageerror", lambda error: wrong.append(str(error)))
        window.on(
            "request",
            lambda request: request.url == path.as_uri() or wrong.append(f"asked for {request.url}"),
        )
        window.goto(path.as_uri())
        window.wait_for_selector("footer")
        return window

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []


FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"block": "gpt2"},
    "modern": {"block": "modern", "n_kv_head": 2, "tie_embeddings": False},
    "table": {"n_layer": 0},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_shown_without_an_error(make_generator, opened: Open, family: str) -> None:
    window = opened(Explanation(make_generator(block_size=32, **FAMILIES[family]), PROMPT))
    headings = window.locator("h2").all_inner_texts()
    assert [h.split("\n")[-1] for h in headings][:2] == ["The model", "Tokens"]
    assert len(headings) == (4 if family == "table" else 11)
    assert "[object" not in window.locator("main").inner_text()
    assert window.locator("main b, main script").count() == 0
    assert window.locator(".qx-thumb").count() == (0 if family == "table" else 8)


def test_sliders_give_the_probabilities_that_quill_draws_with(make_generator, opened: Open) -> None:
    generator = make_generator(block_size=32)
    window = opened(Explanation(generator, PROMPT))

    def slide(name: str, value: float) -> None:
        slider = window.get_by_role("slider", name=name)
        slider.evaluate("(e, v) => { e.value = v; e.dispatchEvent(new Event('input')); }", str(value))

    def shown() -> list[str]:
        return window.locator(".qx-next tbody tr td:nth-child(4)").all_inner_texts()[:12]

    seen = []
    for temperature, k, p in (
        (0.8, None, None),
        (2.0, None, None),
        (1.5, 5, None),
        (1.5, 9, 0.7),
        (0, 9, 0.7),
    ):
        slide("Temperature", temperature)
        slide("Top-k", k or 29)
        slide("Top-p", p or 1)
        config = SampleConfig(temperature=temperature, top_k=k, top_p=p)
        expected = [row["sampled"] for row in Explanation(generator, PROMPT, config).next_tokens(12)]
        seen.append(shown())
        for text, share in zip(seen[-1], expected, strict=True):
            given = 0.0005 if text == "<0.1%" else float(text.rstrip("%")) / 100
            assert given == pytest.approx(share, abs=0.00051)
    assert len(set(map(tuple, seen))) == len(seen)
    window.get_by_role("button", name="Draw a token").click()
    likeliest = window.locator(".qx-next tbody th").first.inner_text()
    assert window.get_by_role("status").inner_text() == f"Drawn: {likeliest}"


def test_it_is_worked_with_the_keyboard(make_generator, opened: Open) -> None:
    explained = Explanation(make_generator(block_size=32), PROMPT)
    window = opened(explained)
    chosen = window.locator(".qx-chip[aria-pressed=true]")
    chosen.focus()
    window.keyboard.press("ArrowLeft")
    assert chosen.inner_text() == ">"
    assert window.evaluate("document.activeElement.textContent") == ">"
    thumb = window.get_by_role("button", name="Block 2, head 3")
    thumb.focus()
    window.keyboard.press("Enter")
    t = len(PROMPT) - 2
    rows = window.locator(".qx-tall tbody tr")
    weights = [
        float(x.rstrip("%").lstrip("<")) / 100 for x in rows.locator("td:nth-child(5)").all_inner_texts()
    ]
    expected = explained.trace.layers[1].weights[2, t, : t + 1].tolist()
    assert weights == pytest.approx(expected, abs=0.00101)
    assert rows.last.inner_text().endswith("later: hidden")
    window.get_by_role("checkbox").check()
    assert "Block 2, head 3" in window.locator("h3").all_inner_texts()


def test_it_fits_a_phone(make_generator, opened: Open) -> None:
    window = opened(Explanation(make_generator(block_size=32), PROMPT), viewport=PHONE, color_scheme="dark")
    assert window.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    small = (
        "[...document.querySelectorAll('button, input')].filter(e => e.getBoundingClientRect().height < 18)"
    )
    assert window.evaluate(f"{small}.map(e => e.outerHTML)") == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(make_generator, opened: Open, axe: Axe, scheme: str) -> None:
    window = opened(Explanation(make_generator(block_size=32), PROMPT), color_scheme=scheme, bypass_csp=True)
    assert axe(window) == []


def test_text_cannot_leave_the_data(make_generator) -> None:
    explained = Explanation(make_generator(block_size=32), PROMPT)
    html = explained.html()
    [data] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html)
    assert json.loads(data) == json.loads(json.dumps(explained.to_dict()))
    assert "<b>" not in html
    assert html.count("</script>") == 2


def test_the_script_makes_no_markup_and_requests_nothing() -> None:
    script = page.asset("explain.js")
    forbidden = (
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|Function\(|fetch\(|XMLHttp|import\b"
    )
    assert re.findall(forbidden, script) == []
    assert set(re.findall(r"https?://[^\s\"']+", script)) == {"http://www.w3.org/2000/svg"}
    assert re.findall(r"^export function (\w+)", script, re.MULTILINE) == [
        "h",
        "svg",
        "visible",
        "distribution",
        "mount",
    ]
    assert "url(" not in page.asset("explain.css")
