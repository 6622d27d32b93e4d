"""The page in a browser: a question typed, an answer streamed and stopped, a file dropped, a run started and its curve moving.

Chromium as Debian has it (`apt-get install chromium fonts-noto-cjk`); without it these tests are skipped. Short by default:
one language at each width; `make pages` takes both at both.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("playwright")

from playwright.sync_api import sync_playwright

from tests.conftest import byte_level_tokenizer, dialogues, tiny_llama, write_recipe, write_rows
from tests.serving.web.page_server import TOKEN, Parrot, make_chat_backend, serving
from tongwen.commands.web import make_backend
from tongwen.workflows import run_manager
from tongwen.workflows.run_lock import lock_holder
from tongwen.workflows.workspace import Workspace

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or ""
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no chromium here")

WIDTHS = {"en": (1280, 390), "zh": (390, 1280)}
LONG = bool(os.environ.get("TONGWEN_PAGES"))
SEEN = [(language, width) for language, widths in WIDTHS.items() for width in widths[: None if LONG else 1]]
PATIENCE = 120_000  # milliseconds, for a machine that has other work
TABS = {"en": ("Chat", "Data", "Vocabulary", "Runs"), "zh": ("对话", "数据", "词表", "训练")}
HOSTILE = (
    '<script>window.hurt=1</script><img src=x onerror="window.hurt=2"> ![far](http://far.example/a.png) '
    '[go](javascript:window.hurt=3) <svg onload="window.hurt=4"></svg><iframe src=http://far.example></iframe> '
    "\\(\\href{javascript:window.hurt=5}{x}\\) 完"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place of work: a tiny model and a recipe."""
    place = tmp_path_factory.mktemp("work")
    tokenizer = byte_level_tokenizer(place / "base")
    tiny_llama(place / "base", len(tokenizer))
    write_recipe(
        place, place / "base", dialogues(60), sft=", save_every: 10, stop_after: 300 steps"
    )  # so long that one sees it move
    return place


@pytest.fixture(scope="module")
def parrot() -> Parrot:
    return Parrot()


@pytest.fixture(scope="module")
def address(folder: Path, parrot: Parrot, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    place = Workspace.of([str(folder)], uploads=str(tmp_path_factory.mktemp("uploads")))
    with serving(make_backend(place, make_chat_backend(parrot, "parrot", "second"))) as url:
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(params=SEEN, ids=lambda seen: f"{seen[0]}-{seen[1]}")
def page(request: Any, browser: Any, address: str, parrot: Parrot) -> Iterator[Any]:
    """The page, open; at the end no other host got a request, no foreign script ran, nothing overflows."""
    language, width = request.param
    parrot.pause = 0.0
    visit = browser.new_context(
        viewport={"width": width, "height": 844}, locale="zh-CN" if language == "zh" else "en-US"
    )
    shown = visit.new_page()
    shown.set_default_timeout(PATIENCE)
    shown.language, shown.strange, shown.complaints = language, [], []
    ours = (f"{address}/", "data:", "blob:")
    shown.on("request", lambda sent: sent.url.startswith(ours) or shown.strange.append(sent.url))
    shown.on("console", lambda message: message.type == "error" and shown.complaints.append(message.text))
    shown.on("pageerror", lambda error: shown.complaints.append(str(error)))
    shown.goto(f"{address}/{language}/?token={TOKEN}")
    shown.wait_for_selector("#question")
    yield shown
    assert shown.evaluate("document.documentElement.scrollWidth") <= width, "the page is wider than the window"
    assert shown.evaluate("window.hurt") is None
    assert not [url for url in shown.strange if "far.example" not in url]
    assert not [message for message in shown.complaints if "far.example" not in message]
    visit.close()


def wait_for(what: Callable[[], Any]) -> Any:
    ends = time.monotonic() + PATIENCE / 1000
    while not (found := what()) and time.monotonic() < ends:
        time.sleep(0.05)
    assert found, "waited in vain"
    return found


def tab(page: Any, number: int) -> None:
    page.get_by_role("tab", name=TABS[page.language][number], exact=True).click()


def leave(page: Any, go: Callable[[], Any]) -> None:
    """Away from the page, which had nothing to complain of until then: that its streams are cut is what it will say."""
    assert not page.complaints
    go()
    page.complaints.clear()


def ask(page: Any, text: str) -> None:
    page.fill("#question", text)
    page.press("#question", "Enter")


def answer(page: Any, side: int = 0) -> str:
    found = page.locator(f"#board{side} .bot .said")
    return found.last.inner_text() if found.count() else ""


def test_answer_is_streamed_and_stopped(page: Any, parrot: Parrot) -> None:
    parrot.pause = 0.03
    closed = parrot.closed
    ask(page, "一二三四五六七八九十" * 40)
    assert page.input_value("#question") in ("", "一二三四五六七八九十" * 40)
    first = wait_for(lambda: len(answer(page)))
    wait_for(lambda: len(answer(page)) > first + 5)
    page.click("#halt")
    wait_for(lambda: parrot.closed > closed)
    page.wait_for_selector("#send")
    length = len(answer(page))
    time.sleep(0.5)
    assert 0 < len(answer(page)) == length < 400, "it went on after it was stopped"
    parrot.pause = 0.0
    ask(page, "再问")
    wait_for(lambda: answer(page) == "再问")


def test_conversations_are_kept_and_exported(page: Any, parrot: Parrot) -> None:
    ask(page, "记住我")
    wait_for(lambda: page.locator("#export button").count() == 4)
    with page.expect_download() as taken:
        page.locator("#export button").first.click()
    assert "记住我" in Path(taken.value.path()).read_text(encoding="utf-8")
    leave(page, page.reload)
    page.wait_for_selector("#question")
    page.select_option("#conversations", label="记住我")
    wait_for(lambda: answer(page) == "记住我")
    ask(page, "还在吗")
    wait_for(lambda: answer(page) == "还在吗")
    assert [one["content"] for one in parrot.requests[-1]] == ["记住我", "记住我", "还在吗"]
    wait_for(lambda: page.locator("#pace0").inner_text().strip())
    page.click("#fresh")
    wait_for(lambda: not page.locator("#pace0").inner_text().strip())


def test_stored_conversation_is_opened(page: Any) -> None:
    """What v0.1 kept, in the form that the page keeps today."""
    stored = (Path(__file__).parents[2] / "data" / "v0.1" / "shelf.json").read_text(encoding="utf-8")
    page.evaluate("text => localStorage.setItem('tongwen.chats', text)", stored)
    leave(page, page.reload)
    page.wait_for_selector("#question")
    page.select_option("#conversations", "1")
    wait_for(lambda: answer(page) == "今天天气很好。")
    assert page.locator("#board0 .mine .said").inner_text() == "你好 <b> & `<i>`"
    assert page.input_value("#system") == "简短"


def test_two_models_answer_side_by_side(page: Any) -> None:
    assert page.locator("#board1").is_visible()
    ask(page, "同一个问题")
    wait_for(lambda: answer(page, 0) == answer(page, 1) == "同一个问题")


def test_hostile_model_output_is_shown_as_text(page: Any) -> None:
    ask(page, HOSTILE)
    wait_for(lambda: answer(page).endswith("完"))
    assert "<script>window.hurt=1</script>" in answer(page), "the output can be read"
    assert "window.hurt=4" in answer(page)
    for forbidden in ("script", "iframe", "svg[onload]", "[onerror]", "a[href^='javascript']"):
        assert page.locator(f"#board0 .said {forbidden}").count() == 0, forbidden


def test_code_formulas_and_thinking_are_rendered(page: Any) -> None:
    ask(page, "<think>我想想</think>好：\\(x^2\\)\n\n```python\nx = 1 < 2\n```\n")
    page.wait_for_selector("#board0 .bot code.language-python")
    assert "x = 1 < 2" in page.locator("#board0 .bot code.language-python").inner_text()
    assert "x^2" in answer(page), "a formula stays text"
    text = page.locator("#board0 .bot").inner_text()
    assert "<think>" not in text and ("思考" if "/zh" in page.url else "Reasoning") in text
    assert not page.get_by_text("我想想", exact=True).first.is_visible(), "thinking is folded"


def test_problem_stays_until_the_next_try(page: Any) -> None:
    ask(page, "OOM")
    page.wait_for_selector("#board0 .notice")
    assert page.locator("#board0 .notice").get_attribute("role") == "alert"
    assert page.is_enabled("#question")


def test_question_is_edited_and_answered_again(page: Any, parrot: Parrot) -> None:
    ask(page, "错字")
    wait_for(lambda: answer(page) == "错字" and page.locator("#board0 .edit").count())
    page.locator("#board0 .edit").first.click()
    page.fill("#board0 .draft", "正字")
    page.locator("#board0 .turn.mine .main").click()
    wait_for(lambda: answer(page) == "正字" and page.locator(".retry").count())
    assert [one["content"] for one in parrot.requests[-1]] == ["正字"]
    before = len(parrot.requests)
    page.locator(".retry").first.click()
    wait_for(lambda: len(parrot.requests) > before and page.locator(".retry").count())
    assert answer(page) == "正字" and page.locator("#board0 .turn").count() == 2


def test_every_control_has_a_name(page: Any) -> None:
    for name in range(4):
        tab(page, name)
        nameless = page.evaluate(
            """() => [...document.querySelectorAll("button,input,select,textarea")].filter(one => one.offsetParent &&
            !(one.textContent.trim() || one.getAttribute("aria-label") || one.closest("label"))).map(one => one.outerHTML)"""
        )
        assert not nameless
    page.press("[role=tab][aria-selected=true]", "ArrowRight")
    assert page.locator("[role=tab]").first.get_attribute("aria-selected") == "true"


def test_dropped_file_is_inspected(page: Any, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "问答.jsonl", dialogues(12))
    with file.open("a", encoding="utf-8") as stream:
        stream.write('{"instruction": "坏\n')
    tab(page, 1)
    page.select_option("#template", "chatml")
    page.set_input_files("#dropped", str(file))
    page.wait_for_selector("#samples .l")
    assert "not_json" in page.locator(".problems").inner_text()
    assert page.locator("#samples .tokens .s").count() == 5
    assert "alpaca" in page.locator(".cards").first.inner_text()


def test_text_is_tokenized(page: Any) -> None:
    tab(page, 2)
    page.fill("#text", "你好，世界。<b>")
    page.click("#cut")
    page.wait_for_selector("#tokens .tokens span")
    assert page.locator("#tokens .tokens").inner_text() == "你好，世界。<b>"
    assert page.frame_locator("iframe.sheet").locator("table").count() >= 1


@pytest.mark.sample()  # a minute: with --all
def test_run_is_started_stopped_and_resumed(page: Any, folder: Path) -> None:
    if not LONG and page.viewport_size["width"] < 1000:
        pytest.skip("make pages runs it on a narrow page too")
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    tab(page, 3)
    wait_for(lambda: page.input_value("#recipe"))
    page.click("#start")
    page.wait_for_selector("#picture polyline")
    drawn = page.locator("#picture polyline").first.get_attribute("points")
    wait_for(lambda: page.locator("#picture polyline").first.get_attribute("points") != drawn)
    leave(page, page.reload)
    page.wait_for_selector("#picture polyline")  # the address keeps the tab
    if lock_holder(out):
        page.locator("#stop:not([disabled])").click()
        wait_for(lambda: not lock_holder(out))
        page.locator("#resume:not([disabled])").click()
        wait_for(lambda: lock_holder(out) or run_manager.facts(out)[0][0] == "finished")
    wait_for(lambda: not lock_holder(out))
    assert run_manager.facts(out)[0][0] == "finished", run_manager.log(out)
    link = page.locator("#picture a[href^='/report']").first
    report = f"{page.url.split('/zh')[0].split('/en')[0]}{link.get_attribute('href')}"
    leave(page, lambda: page.goto(report))
    assert "tiny" in page.locator("h1").inner_text()
