"""The page in a real browser, by keyboard and mouse, light and dark, wide and narrow."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.memories import text
from tests.support.patience import PATIENCE_S
from tests.support.serving import Room, Running, running, until

pytestmark = pytest.mark.slow
KEY = "long-secret"
HOSTILE = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>"
SIZES = {"light": (1200, 800, "light"), "dark": (1200, 800, "dark"), "phone": (390, 844, "light")}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    driver = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no browser: apt-get install chromium")
    with driver.sync_playwright() as playwright:
        options = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        opened = playwright.chromium.launch(executable_path=found, args=options)
        yield opened
        opened.close()


@pytest.fixture
def wrong() -> list[str]:
    """What the page complains of."""
    return []


@pytest.fixture
def page(browser: Any, wrong: list[str]) -> Iterator[Any]:
    """A window; whatever it complains of fails the test that does not take it out."""
    context = browser.new_context()
    context.set_default_timeout(PATIENCE_S * 1000)
    opened = context.new_page()
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
    yield opened
    context.close()
    assert wrong == []


def taken(wrong: list[str], said: str) -> int:
    """Takes out complaints that say so; gives how many there were."""
    found = [one for one in wrong if said in one]
    for one in found:
        wrong.remove(one)
    return len(found)


def listed(page: Any, name: str, about: str) -> Any:
    """Waits for a document with such a line."""
    item = page.locator("#documents li").filter(has_text=name).filter(has_text=about)
    item.wait_for()
    return item


def test_a_memory_is_asked_and_a_passage_read_at_its_place(room: Room, own: Room, page: Any, wrong: list[str]) -> None:
    with running(own, max_tokens=20, api_key=KEY) as locked:
        page.goto(locked.address)
        page.get_by_label("Key", exact=True).fill("wrong")
        page.keyboard.press("Enter")
        page.get_by_text("That was not the key").wait_for()
        page.get_by_label("Key", exact=True).fill(KEY)
        page.keyboard.press("Enter")
        page.locator("#documents li").nth(2).wait_for()
        assert taken(wrong, "status of 401") == 2
        assert page.locator("#memory option").all_text_contents() == ["mine", "other", "model (no memory)"]
        held = f"3 documents {len(room.memory('mine'))} tokens stored"
        assert page.locator("#held summary").text_content() == held

        page.get_by_role("textbox", name="Question").fill("What is word5?")
        page.keyboard.press("Enter")
        page.locator(".passages button").first.wait_for()
        done: Any = locked.client(KEY).chat.completions.create(
            model="mine", messages=[{"role": "user", "content": "What is word5?"}]
        )
        assert page.locator(".answer").text_content() == done.choices[0].message.content
        assert page.locator(".passages button").count() == len(done.passages)

        best = done.passages[0]
        page.locator(".passages button").first.focus()
        page.keyboard.press("Enter")
        page.locator("#place mark").wait_for()
        assert page.locator("#placeName").text_content() == best["document"]
        assert page.locator("#place mark").text_content() == best["text"]
        whole = text(int(best["document"][-5]), 40 + 5 * int(best["document"][-5]))
        assert page.locator("#placeText").text_content() == whole[: best["stop"] + 400]
        assert page.locator("#earlier").is_disabled()
        page.keyboard.press("Escape")
        page.locator("#place").wait_for(state="hidden")

        page.locator("#memory").select_option("model")
        page.locator("#held").wait_for(state="hidden")
        assert page.locator(".turn").count() == 0


def test_an_answer_is_seen_coming_and_can_be_stopped(server: Running, page: Any) -> None:
    page.goto(server.address)
    page.get_by_role("textbox", name="Question").fill("word5")
    page.get_by_role("button", name="Ask").click()
    until(lambda: len(page.locator(".answer").text_content()) > 5)
    seen = page.locator(".answer").text_content()
    until(lambda: len(page.locator(".answer").text_content()) > len(seen))
    assert page.locator(".answer").text_content().startswith(seen)
    page.get_by_role("button", name="Stop").click()
    page.get_by_text("Stopped.").wait_for()
    until(lambda: server.number("fot_requests_running") == 0)
    assert page.get_by_role("button", name="Ask").is_visible()


def test_files_are_dropped_read_shown_and_forgotten(
    fresh: Running, page: Any, wrong: list[str], tmp_path: Path
) -> None:
    """What is in them, and what they are called, is text whatever it says."""
    page.goto(fresh.address)
    (tmp_path / "<b>new.txt").write_text(HOSTILE + text(9), encoding="utf-8")
    page.locator("#files").set_input_files([tmp_path / "<b>new.txt"])
    listed(page, "<b>new.txt", f"{len(HOSTILE + text(9))} tokens").locator(".name").click()
    page.locator("#place[open]").wait_for()
    assert page.locator("#placeText").text_content() == (HOSTILE + text(9))[:400]
    page.get_by_role("button", name="Close").click()

    page.evaluate(
        """said => {
            const data = new DataTransfer();
            data.items.add(new File([said], "long.txt"));
            document.body.dispatchEvent(new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true}));
        }""",
        text(5, 1200),
    )
    bar = listed(page, "long.txt", "reading: ").locator("progress")
    assert 0 < int(bar.get_attribute("max")) == len(text(5, 1200))
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Forget long.txt").click()
    listed(page, "<b>new.txt", "tokens")
    until(lambda: page.locator("#documents li").count() == 4)
    assert fresh.documents("mine").keys() == {f"shelf/book{number}.txt" for number in range(3)} | {"<b>new.txt"}

    page.locator("#files").set_input_files([{"name": "pipe.bin", "mimeType": "x/y", "buffer": b"\0\1"}])
    page.locator("#notice").get_by_text("not text").wait_for()
    assert taken(wrong, "status of 400") == 1
    assert (page.title(), page.locator("img, b").count()) == ("Memories", 0)


def test_no_html_runs_even_where_a_script_would_put_it_in(fresh: Running, page: Any, wrong: list[str]) -> None:
    policy = page.goto(fresh.address).headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    page.locator("#documents li").nth(2).wait_for()
    refused = page.evaluate(
        "html => { try { document.body.innerHTML = html; return ''; } catch (error) { return error.name; } }", HOSTILE
    )
    assert refused == "TypeError"
    until(lambda: page.title() == "Memories" and taken(wrong, "requires 'TrustedHTML'"))


@pytest.mark.parametrize("name", SIZES)
def test_everything_fits(fresh: Running, browser: Any, tmp_path: Path, name: str) -> None:
    width, height, scheme = SIZES[name]
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    page = context.new_page()
    page.set_default_timeout(PATIENCE_S * 1000)
    page.goto(fresh.address)
    page.locator("#documents li").nth(2).wait_for(state="attached")
    assert fresh.put("mine", "a-name-without-a-place-to-break-" + "x" * 120, text(6))[0] == 202
    page.get_by_role("textbox", name="Question").fill("word " * 60)
    page.keyboard.press("Enter")
    page.locator(".passages button").first.wait_for()
    fresh.until_read("mine")
    folder = Path(os.environ.get("FOT_SCREENSHOTS", tmp_path))
    page.screenshot(path=folder / f"{name}.png")
    if name == "phone":
        page.locator("#held summary").click()
    page.locator("#documents li").nth(3).wait_for()
    page.screenshot(path=folder / f"{name}-documents.png")
    if name == "phone":
        page.locator("#held summary").click()
    page.locator(".passages button").first.click()
    page.locator("#place[open]").wait_for()
    page.screenshot(path=folder / f"{name}-passage.png")
    for one in ("document.documentElement", "document.querySelector('#place')"):
        assert page.evaluate(f"{one}.scrollWidth <= {one}.clientWidth"), one
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    shade = sum(int(part) for part in back.removeprefix("rgb(").removesuffix(")").split(","))
    assert (shade < 3 * 128) is (scheme == "dark")
    context.close()
