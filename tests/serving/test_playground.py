"""The playground of `quill serve` in a real browser, and what its files may contain."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlencode

import pytest
from browsing import PHONE, WIDE, Axe, new_context
from servers import Running, running

from quill.cli.app import main
from quill.registry.store import Registry
from quill.serving import playground

PROMPT = "3 bells"
MARKUP = "<script>window.broken=1</script><img src=x onerror=window.broken=1>"

Open = Callable[..., Any]


@pytest.fixture(scope="module")
def site(tiny_registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server of two models, `tiny` and `other`, that lets a text be long."""
    copied = tmp_path_factory.mktemp("site") / "weights"
    shutil.copytree(tiny_registry.root, copied)
    shutil.copytree(copied / "tiny", copied / "other")
    with running(Registry(copied), "--max-tokens", "50000") as made:
        yield made


@pytest.fixture
def opened(browser: Any, site: Running) -> Iterator[Open]:
    """Open the playground by a link; fails if the page errs or asks another host for anything."""
    contexts, wrong = [], []
    address = f"http://127.0.0.1:{site.port}/"

    def open_page(
        viewport: dict[str, int] = WIDE,
        answers: dict[str, Any] | None = None,
        options: dict[str, Any] | None = None,
        refused: str = "Failed to load resource",
        **link: Any,
    ) -> Any:
        context = new_context(browser, viewport=viewport, **(options or {}))
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        contexts.append(context)
        window = context.new_page()
        # To Chromium what is refused is an error; the tests look at what the page makes of it.
        window.on("console", lambda m: refused in m.text or wrong.append(m.text))
        window.on("pageerror", lambda error: wrong.append(str(error)))
        window.on("request", lambda r: r.url.startswith(address) or wrong.append(f"asked for {r.url}"))
        for pattern, answer in (answers or {}).items():
            window.route(pattern, answer)
        window.goto(f"{address}#{urlencode({'model': 'tiny:v1', **link})}")
        return window

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []


def generate(window: Any) -> None:
    """Press Generate, and wait for the end."""
    window.get_by_role("button", name="Generate").click()
    finish(window)


def finish(window: Any) -> None:
    """Wait until nothing is written any more."""
    window.wait_for_selector(".samples:not(:has([aria-busy=true]))")
    window.locator("#stop").wait_for(state="hidden")


def texts(window: Any) -> list[str]:
    """What each sample has written."""
    script = "all => all.map(e => [...e.querySelectorAll('.t')].map(t => t.textContent).join(''))"
    return window.locator(".text").evaluate_all(script)


def answer(document: Any, status: int = 200) -> Callable[[Any], None]:
    """Answer a request with a document."""
    return lambda route: route.fulfill(status=status, json=document)


def test_text_streams_in_and_is_shaded_by_probability(opened: Open, site: Running) -> None:
    window = opened(prompt=PROMPT, seed=7, length=40)
    generate(window)
    fields = {"prompt": PROMPT, "seed": 7, "max_tokens": 40, "temperature": 0.8, "logprobs": 1}
    [choice] = site.complete(**fields).json["choices"]
    assert texts(window) == [choice["text"]]
    assert window.locator(".given").inner_text() == PROMPT
    shades = window.locator(".text .t").evaluate_all("all => all.map(e => +e.className.match(/s(\\d)/)[1])")
    least = [0.6, 0.3, 0.1, 0.03, 0.01, 0]
    for shade, logprob in zip(shades, choice["logprobs"]["token_logprobs"], strict=True):
        p = 2.718281828459045**logprob
        assert least[shade] <= p + 1e-9 and (not shade or p < least[shade - 1] + 1e-9)
    assert window.locator(".note").inner_text() == "40 tokens · seed 7"
    assert window.get_by_role("status").text_content() == "Done, 40 tokens"


def test_generate_waits_for_the_list_of_models(opened: Open) -> None:
    held: list[Any] = []
    window = opened(
        prompt=PROMPT, seed=7, length=5, answers={"**/v1/models*": lambda route: held.append(route)}
    )
    window.get_by_role("button", name="Generate").click()
    assert texts(window) == []
    held[0].continue_()
    finish(window)
    assert len(texts(window)) == 1
    assert window.get_by_role("status").text_content() == "Done, 5 tokens"


@pytest.mark.parametrize(
    "action",
    [
        "document.querySelector('#stop').click()",
        "document.body.dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape', bubbles: true}))",
    ],
    ids=["button", "escape"],
)
def test_stop_ends_a_text_and_keeps_it(opened: Open, action: str) -> None:
    window = opened(prompt=PROMPT, length=50_000)
    # From within the page, so that a text grows no longer than until its first tokens are shown.
    window.evaluate(
        """() => new MutationObserver((_, observer) => {
            if (!document.querySelector('.text .t')) return;
            observer.disconnect();
            ACTION;
        }).observe(document.body, {childList: true, subtree: true})""".replace("ACTION", action)
    )
    generate(window)
    assert 0 < len(texts(window)[0]) < 50_000
    assert "stopped" in window.locator(".note").inner_text()
    window.locator("#length").fill("5")
    generate(window)
    assert len(texts(window)[0]) == 5


def test_two_models_and_several_samples_stand_side_by_side(opened: Open, site: Running) -> None:
    window = opened(prompt=PROMPT, seed=3, length=20, samples=2)
    window.get_by_role("button", name="Compare").click()
    assert window.locator("#other-model").input_value() == "other"
    generate(window)
    titles = window.locator(".sample h3").all_inner_texts()
    assert titles == [f"{name}:v1: Sample {i}" for i in (1, 2) for name in ("tiny", "other")]
    fields = {"prompt": PROMPT, "seed": 3, "max_tokens": 20, "temperature": 0.8, "n": 2}
    first, second = (c["text"] for c in site.complete(**fields).json["choices"])
    assert texts(window) == [first, first, second, second]
    boxes = [window.locator(".sample").nth(i).bounding_box() for i in range(4)]
    assert boxes[0]["y"] == boxes[1]["y"] < boxes[2]["y"] == boxes[3]["y"]
    assert boxes[0]["x"] < boxes[1]["x"]


def test_a_token_shows_what_else_it_could_have_been_and_continues_from_it(
    opened: Open, site: Running
) -> None:
    window = opened(prompt=PROMPT, seed=7, length=24)
    generate(window)
    [before] = texts(window)
    window.locator(".text .t").nth(9).click()
    dialog = window.get_by_role("dialog")
    fields = {"prompt": PROMPT, "seed": 7, "max_tokens": 24, "temperature": 0.8, "logprobs": 8}
    body = site.complete(**fields, return_token_ids=True).json["choices"][0]
    top = sorted(body["logprobs"]["top_logprobs"][9].items(), key=lambda item: -item[1])
    shown = dialog.locator(".option").all_inner_texts()
    assert [line.split("\n")[0].replace("␣", " ").replace("⏎", "\n") for line in shown] == [t for t, _ in top]
    for line, (_, logprob) in zip(shown, top, strict=True):
        share = re.search(r"([\d.]+)%", line)[1]
        assert float(share) == pytest.approx(100 * 2.718281828459045**logprob, abs=0.051)
    [taken] = dialog.locator("[aria-current]").all_inner_texts()
    assert taken.startswith(before[9].replace(" ", "␣"))
    other = next(t for t, _ in top if t != before[9])
    at = [t for t, _ in top].index(other)
    dialog.locator(".option").nth(at).click()
    finish(window)
    [after] = texts(window)
    ids = [*body["prompt_token_ids"], *body["token_ids"][:9], body["logprobs"]["top_token_ids"][9][other]]
    rest = site.complete(prompt=[ids[-16:]], seed=7, max_tokens=14, temperature=0.8).json["choices"][0][
        "text"
    ]
    assert after == before[:9] + other + rest
    assert "2 of 2" in window.locator(".pager").inner_text()
    window.get_by_role("button", name="Earlier text").click()
    assert texts(window) == [before]
    window.get_by_role("button", name="Continue").click()
    finish(window)
    assert len(texts(window)[0]) == 48
    assert texts(window)[0].startswith(before)


def test_an_error_is_said_and_costs_no_text(opened: Open) -> None:
    window = opened(prompt="€", length=5)
    generate(window)
    assert "€" in window.get_by_role("alert").inner_text()
    window.get_by_role("textbox", name="Prompt").fill(PROMPT)
    generate(window)
    assert window.get_by_role("alert").count() == 0
    [before] = texts(window)
    window.route("**/v1/completions", lambda route: route.abort())
    window.get_by_role("button", name="Continue").click()
    finish(window)
    assert "does not answer" in window.get_by_role("alert").inner_text()
    assert texts(window) == [before]


def test_h14_f15_markup_is_shown_as_text(opened: Open, site: Running) -> None:
    [model] = [m for m in site.get("/v1/models?versions=all").json["data"] if m["id"] == "tiny:v1"]
    card = site.get("/v1/quill/card/tiny:v1").json
    token = {
        "tokens": [MARKUP], "token_logprobs": [-1.0], "top_logprobs": [{MARKUP: -1.0, f"{MARKUP}!": -2.0}],
        "top_token_ids": [{MARKUP: 1, f"{MARKUP}!": 2}], "text_offset": [0],
    }  # fmt: skip
    chunk = {
        "choices": [
            {"index": 0, "text": MARKUP, "token_ids": [1], "prompt_token_ids": [0], "logprobs": token}
        ]
    }
    events = f"data: {json.dumps(chunk)}\n\ndata: {json.dumps({'error': {'message': MARKUP}})}\n\n"
    answers = {
        "**/v1/models?*": answer({"data": [{**model, "id": f"{MARKUP}:v1"}, model]}),
        "**/v1/quill/card/*": answer({**card, "reference": MARKUP, "card": MARKUP, "device": MARKUP}),
        "**/v1/completions": lambda route: route.fulfill(body=events, content_type="text/event-stream"),
    }
    window = opened(prompt=MARKUP, model=f"{MARKUP}:v1", **{"with": f"{MARKUP}:v2"}, answers=answers)
    assert MARKUP in window.get_by_role("alert").inner_text()
    assert window.locator("#model").input_value() == MARKUP
    generate(window)
    assert texts(window) == [MARKUP]
    window.locator(".text .t").click()
    assert MARKUP.replace(" ", "␣") in window.get_by_role("dialog").inner_text()
    window.keyboard.press("Escape")
    for tab, place in (("Model card", ".card"), ("Look inside", "#explanation [role=alert]")):
        window.get_by_role("tab", name=tab).click()
        assert "<script>" in window.locator(place).first.inner_text()
    assert window.evaluate("window.broken") is None
    assert window.locator("main script, img[src=x], [role=dialog] script, header script").count() == 0


def test_a_character_of_several_tokens_is_walked_through_and_not_begun_in_its_middle(opened: Open) -> None:
    names, ids = ["a", r"bytes:\xc3", r"bytes:\xa9", "\x1b"], [1, 2, 3, 4]
    tops = [{n: -1.0, r"bytes:\xff": -2.0, "z": -3.0} for n in names]
    table = {
        "tokens": names, "token_logprobs": [-1.0] * 4, "top_logprobs": tops,
        "top_token_ids": [dict.fromkeys(t, 9) | {n: i} for t, n, i in zip(tops, names, ids, strict=True)],
        "text_offset": [0, 1, 1, 2],
    }  # fmt: skip
    choice = {"index": 0, "text": "aé\x1b", "token_ids": ids, "prompt_token_ids": [0], "logprobs": table}
    events = f"data: {json.dumps({'choices': [{**choice, 'finish_reason': 'stop'}]})}\n\ndata: [DONE]\n\n"
    fields = {"body": events, "content_type": "text/event-stream", "headers": {"x-quill-notice": "too long"}}
    window = opened(prompt="3", seed=1, answers={"**/v1/completions": lambda route: route.fulfill(**fields)})
    generate(window)
    assert texts(window) == ["aé\x1b"]
    parts = window.locator(".text .t").evaluate_all("all => all.map(e => e.dataset.part)")
    assert parts == ["", "c3", "", r"\u1b"]
    assert window.locator(".note").inner_text() == "4 tokens · the model ended the text · seed 1"
    assert "Too long." in window.locator(".sample").inner_text()
    assert [t.inner_text() for t in window.locator(".text .t").all()] == ["a", "", "é", "\x1b"]
    window.get_by_role("button", name="Tokens").click()
    dialog = window.get_by_role("dialog")
    for name, others in (("a", 1), (r"bytes:\xc3", 1), (r"bytes:\xa9", 0), (r"\u1b", 1)):
        assert dialog.locator("h2 .token").inner_text() == name
        assert dialog.locator("button.option").count() == others
        window.keyboard.press("ArrowRight")


def test_the_policy_keeps_markup_out_even_of_a_mistake(opened: Open) -> None:
    window = opened(refused="TrustedHTML")
    error = window.evaluate("try { document.body.innerHTML = 'x'; '' } catch (error) { error.name }")
    assert error == "TypeError"


def test_everything_is_done_with_the_keyboard(opened: Open) -> None:
    window = opened(seed=7, length=12)
    press = window.keyboard.press
    window.locator("#model option").first.wait_for(state="attached")

    def tab_to(selector: str) -> None:
        for _ in range(40):
            press("Tab")
            if window.evaluate("s => document.activeElement.matches(s)", selector):
                return
        raise AssertionError(f"{selector} cannot be reached")

    tab_to("#prompt")
    window.keyboard.type(PROMPT)
    press("Control+Enter")
    finish(window)
    [before] = texts(window)
    tab_to(".text")
    for key in ("ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft", "Enter"):
        press(key)
    heading = window.locator("#alternatives h2")
    assert heading.inner_text().startswith(before[1].replace(" ", "␣"))
    press("ArrowRight")
    assert heading.inner_text().startswith(before[2].replace(" ", "␣"))
    press("Escape")
    assert window.get_by_role("dialog").count() == 0
    assert window.evaluate("document.activeElement.className") == "text"
    press("Enter")
    tab_to("button.option")
    press("Enter")
    finish(window)
    [after] = texts(window)
    assert after[:2] == before[:2] and after[2] != before[2]
    window.locator("#tab-write").focus()
    press("ArrowRight")
    window.wait_for_selector("#explanation footer")
    press("ArrowRight")
    window.wait_for_selector(".curve")
    assert window.evaluate("document.activeElement.id") == "tab-card"


def test_a_link_holds_the_settings_and_writes_the_same_text(opened: Open) -> None:
    window = opened()
    window.get_by_role("textbox", name="Prompt").fill(f"{PROMPT},\n & the #tide")
    window.get_by_text("More settings").click()
    for field, value in (
        ("length", "15"),
        ("temperature", "1.2"),
        ("top_k", "9"),
        ("top_p", "0.95"),
        ("min_p", "0.01"),
    ):
        window.locator(f"#{field}").fill(value)
    window.get_by_role("radio", name="2").check()
    window.get_by_role("button", name="Compare").click()
    window.get_by_role("textbox", name="Prompt").fill(PROMPT)
    generate(window)
    window.get_by_role("button", name="Copy link").click()
    link = window.evaluate("navigator.clipboard.readText()")
    again = opened()
    again.goto(link)
    again.reload()
    again.wait_for_selector("#other-model option", state="attached")
    assert again.locator("#prompt").input_value() == PROMPT
    assert again.locator("#other-model").input_value() == "other"
    for field, value in (
        ("length", "15"),
        ("temperature", "1.2"),
        ("top_k", "9"),
        ("top_p", "0.95"),
        ("min_p", "0.01"),
    ):
        assert again.locator(f"#{field}").input_value() == value
    generate(again)
    assert texts(again) == texts(window)


def test_what_a_field_cannot_take_is_marked_and_not_used(opened: Open) -> None:
    window = opened(length=7, temperature="hot", top_k=-3, samples=99, prompt=PROMPT)
    assert window.locator("#temperature").input_value() == "0.8"
    assert window.locator("#top_k").input_value() == ""
    length = window.locator("#length")
    length.fill("0")
    assert length.get_attribute("aria-invalid") == "true"
    length.blur()
    assert length.input_value() == "7"
    slider = window.get_by_role("slider", name="Length slider")
    slider.press("ArrowRight")
    assert length.input_value() == "8"
    generate(window)
    assert [len(text) for text in texts(window)] == [8] * 4


def test_the_command_line_of_the_page_writes_the_same(
    opened: Open, tiny_registry: Registry, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    window = opened(prompt="3 bells,\n  and", seed=7, length=30, top_k=9, min_p=0.01)
    generate(window)
    window.get_by_text("Use these settings in a program").click()
    window.wait_for_selector(".programs pre:not(:empty)")
    shown = [
        window.get_by_role("region", name=name).inner_text() for name in ("Command line", "curl", "Python")
    ]
    program, *arguments = shlex.split(shown[0])
    assert program == "quill"
    monkeypatch.setenv("QUILL_REGISTRY", str(tiny_registry.root))
    assert main([*arguments, "--device=cpu", "--json", "--no-echo"]) == 0
    assert [json.loads(capsys.readouterr().out)["samples"][0]] == texts(window)
    body = json.loads(shlex.split(shown[1])[-1])
    assert body["prompt"] == "3 bells,\n  and"
    compile(shown[2], "shown", "exec")
    prompt = """-x 'it's' "$(a)" `b` \\ \n!"""
    script = "prompt => import('/static/programs.js').then(m => m.command({prompt, model: 'tiny'}))"
    assert shlex.split(window.evaluate(script, prompt))[3] == f"--prompt={prompt}"


def test_the_look_inside_follows_the_prompt_and_a_token(opened: Open) -> None:
    window = opened(prompt=PROMPT, seed=7, length=12)
    generate(window)
    [text] = texts(window)
    window.locator(".text .t").nth(4).click()
    window.get_by_role("button", name="Look inside here").click()
    window.wait_for_selector("#explanation footer")
    assert window.locator("#inside-prompt").input_value() == PROMPT + text[:4]
    assert window.locator(".qx-section").count() == 11
    chips = window.locator(".qx-chip").all_inner_texts()
    assert "".join(chips) == (PROMPT + text[:4])[-16:].replace(" ", "␣").replace("\n", "⏎")
    window.locator("#inside-prompt").fill("7")
    window.locator("#look").get_by_role("button").click()
    window.wait_for_selector(".qx-chips:not(:has(:nth-child(2 of .qx-chip)))")
    window.get_by_role("tab", name="Write").click()
    assert window.locator("#prompt").input_value() == "7"
    assert texts(window) == [text]


def test_the_card_shows_how_a_model_was_made(opened: Open, tiny: Any) -> None:
    window = opened(view="card", **{"with": "other:v1"})
    window.wait_for_selector(".curve")
    first = window.locator(".card").first
    assert first.locator("h2").inner_text() == "tiny:v1"
    assert f"{tiny.facts['parameters']:,}" in first.inner_text()
    assert f"{tiny.facts['best_val_loss']:.4f}" in first.inner_text()
    assert first.locator("polyline.val").count() == 1
    assert window.locator(".card h2").all_inner_texts() == ["tiny:v1", "other:v1"]


def test_a_key_is_asked_for_once_and_kept(opened: Open) -> None:
    seen = []

    def guard(route: Any) -> None:
        seen.append(route.request.headers.get("authorization"))
        if seen[-1] == "Bearer right":
            route.continue_()
        else:
            route.fulfill(status=401, json={"error": {"message": "the API key is missing or wrong"}})

    window = opened(prompt=PROMPT, length=5, answers={"**/v1/**": guard})
    for key, hint in (("wrong", "only those who have a key"), ("right", "That key is wrong")):
        window.get_by_text(hint).wait_for()
        window.get_by_label("Key", exact=True).fill(key)
        window.get_by_role("button", name="Continue").click()
    generate(window)
    assert len(texts(window)[0]) == 5
    assert seen == [None, "Bearer wrong", "Bearer right", "Bearer right"]
    assert "right" not in window.url


def test_without_models_the_page_says_how_to_get_one(opened: Open) -> None:
    window = opened(answers={"**/v1/models?*": answer({"data": []})})
    window.get_by_role("heading", name="There are no models yet").wait_for()
    assert "quill train" in window.locator("main").inner_text()
    assert not window.get_by_role("button", name="Generate").is_visible()


def test_it_fits_a_phone(opened: Open) -> None:
    window = opened(PHONE, prompt=PROMPT, seed=7, length=60, **{"with": "other:v1"})
    generate(window)
    for name in ("Write", "Look inside", "Model card"):
        window.get_by_role("tab", name=name).click()
        window.wait_for_selector(
            {"Write": ".t", "Look inside": "#explanation footer", "Model card": ".curve"}[name]
        )
        assert window.evaluate("document.documentElement.scrollWidth") <= PHONE["width"], name
    window.get_by_role("tab", name="Write").click()
    assert not window.locator("#temperature").is_visible()
    window.locator("#settings > summary").click()
    assert window.locator("#temperature").is_visible()
    window.locator(".text .t").last.click()
    box = window.get_by_role("dialog").bounding_box()
    token = window.locator(".cursor").bounding_box()
    assert token["y"] + token["height"] <= box["y"]
    assert box["x"] == 0 and box["width"] == PHONE["width"]


@pytest.mark.parametrize(("viewport", "scheme"), [(WIDE, "light"), (PHONE, "dark")], ids=["wide", "phone"])
def test_axe_finds_nothing(opened: Open, axe: Axe, viewport: dict[str, int], scheme: str) -> None:
    options = {"color_scheme": scheme, "bypass_csp": True, "reduced_motion": "reduce"}
    window = opened(
        viewport, options=options, prompt=PROMPT, seed=7, length=60, samples=2, **{"with": "other:v1"}
    )
    generate(window)
    window.get_by_text("Use these settings in a program").click()
    window.locator(".text .t").nth(5).click()
    assert axe(window) == []
    window.keyboard.press("Escape")
    for name, place in (("Look inside", "#explanation footer"), ("Model card", ".curve")):
        window.get_by_role("tab", name=name).click()
        window.wait_for_selector(place)
        assert axe(window) == []


def test_the_files_make_no_markup_and_load_nothing_from_elsewhere() -> None:
    files = {name: content.decode() for name, content in playground.assets().items()}
    assert {"index.html", "playground.js", "playground.css", "explain.js", "icon.svg"} <= set(files)
    for name, content in files.items():
        found = set(re.findall(r"https?://[^\s\"'`]+", content))
        assert found <= {"http://www.w3.org/2000/svg"}, name
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|Function\(", content
        ), name
    assert not re.search(r"<style|style=|<script>|\son\w+=", files["index.html"])
    assert not re.search(
        r"url\(|@import|@font-face", "".join(c for n, c in files.items() if n.endswith(".css"))
    )
