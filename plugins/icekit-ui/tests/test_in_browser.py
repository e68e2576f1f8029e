"""From a dropped picture to a mixed one in a real browser, as a person goes: ``pytest -m slow plugins/icekit-ui``.

Chromium is that of the system. ``ICEKIT_UI_SCREENSHOTS=DIR`` keeps pictures of the page.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
pytest.importorskip("gradio", reason="Gradio is not installed")
pytest.importorskip("icekit_tabletop", reason="the tabletop is not installed")
expect = playwright.expect

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)
PICTURE = Path(__file__).resolve().parents[3] / "examples" / "tabletop.png"
MINUTES = 60_000.0
QUICK = {
    "max_concepts": "2",
    "samples": "1",
    "sample_steps": "4",
    "words_alone": "false",
    "segmentor.draws": "2",
    "learner.steps": "6",
    "learner.word_steps": "2",
    "learner.close_ups": "0",
    "learner.checkpoint_every": "1",
    "exporters": "[]",
}
SETTINGS = [word for key, value in QUICK.items() for word in ("--set", f"{key}={value}")]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


class Browser:
    """A page of the browser at one width, and what went wrong in it."""

    def __init__(self, page: playwright.Page, url: str) -> None:
        self.page, self.faults = page, []
        self.name = f"{page.viewport_size['width']}" if page.viewport_size else ""
        page.on("console", lambda said: self.faults.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: self.faults.append(str(error)))
        page.on("response", lambda answer: self.faults.append(answer.url) if answer.status >= 400 else None)
        page.on("request", lambda asked: self.faults.append(asked.url) if not _is_here(asked.url) else None)
        page.goto(url)
        expect(page.get_by_role("heading", name="icekit")).to_be_visible(timeout=MINUTES)

    def shot(self, what: str) -> None:
        folder = os.environ.get("ICEKIT_UI_SCREENSHOTS")
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.page.screenshot(path=f"{folder}/{self.name}-{what}.png", full_page=True)

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name).click()

    def check_fits(self) -> None:
        """Nothing is wider than the window, so that nobody has to scroll sideways."""
        width = self.page.evaluate("document.documentElement.scrollWidth")
        assert width <= self.page.evaluate("window.innerWidth"), "the page is wider than the window"


def _is_here(url: str) -> bool:
    return url.startswith(("http://127.0.0.1:", "data:", "blob:"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of an earlier day, which the program made in another process."""
    folder = tmp_path_factory.mktemp("ui") / "runs"
    command = [sys.executable, "-m", "icekit", "run", str(PICTURE), "--out", str(folder / "yesterday")]
    subprocess.run([*command, "--backbone", "tabletop", "--learner", "words", *_without_learner(SETTINGS)], check=True)
    return folder


def _without_learner(settings: list[str]) -> list[str]:
    pairs = zip(settings[::2], settings[1::2], strict=True)
    return [word for pair in pairs if not pair[1].startswith("learner.") for word in pair]


@pytest.fixture(scope="module")
def url(runs: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "icekit", "ui", "--runs", str(runs), "--no-browser", "--backbone", "tabletop"]
    with subprocess.Popen([*command, *SETTINGS], stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            said = server.stdout.readline().strip()
            assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", said)
            yield said
        finally:
            server.terminate()


@pytest.fixture(scope="module")
def chromium() -> Iterator[playwright.Browser]:
    assert CHROMIUM, "these tests, run by name, need Chromium: apt-get install chromium"
    with playwright.sync_playwright() as program:
        browser = program.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def test_from_drop_to_mixed_picture(chromium: playwright.Browser, url: str, runs: Path) -> None:
    browser = Browser(chromium.new_page(viewport={"width": 1280, "height": 900}), url)
    page = browser.page

    # 1 Find: the objects come one after another.
    page.set_input_files("input[type=file]", PICTURE)
    expect(page.get_by_text("256 x 256 pixels")).to_be_visible(timeout=MINUTES)
    browser.shot("1-dropped")
    page.get_by_role("button", name="Find objects").click()
    expect(page.locator(".ik-progress")).to_contain_text("looking for objects", timeout=2 * MINUTES)
    expect(page.locator(".ik-legend li")).to_have_count(1, timeout=5 * MINUTES)
    browser.shot("2-finding")
    expect(page.locator(".ik-legend li")).to_have_count(2, timeout=5 * MINUTES)
    expect(page.locator(".ik-painter canvas")).to_be_visible(timeout=2 * MINUTES)
    browser.check_fits()

    # A word and an outline are corrected by hand.
    page.get_by_role("button", name="Object 0").click()
    word = page.get_by_label("Word", exact=True)
    expect(word).not_to_have_value("")
    word.fill("flask")
    word.press("Enter")
    expect(page.locator(".ik-legend")).to_contain_text("flask", timeout=MINUTES)
    path = page.locator(".ik-thing path").first
    before = path.get_attribute("d")
    canvas = page.locator(".ik-painter canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 0.3 * box["width"], box["y"] + 0.8 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.6 * box["width"], box["y"] + 0.8 * box["height"], steps=5)
    page.mouse.up()
    expect(path).not_to_have_attribute("d", before or "", timeout=MINUTES)
    browser.shot("3-corrected")

    # 2 Learn: it is stopped, and goes on.
    page.get_by_role("button", name="Learn these objects").first.click()
    expect(page.locator(".ik-curve").first).to_be_visible(timeout=5 * MINUTES)
    browser.shot("4-learning")
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_text("learning was interrupted")).to_be_visible(timeout=5 * MINUTES)
    browser.shot("5-stopped")
    assert (runs / "tabletop" / "checkpoint" / "learner.safetensors").is_file()
    page.get_by_role("tabpanel").get_by_role("button", name="Go on learning").last.click()
    expect(page.locator(".ik-tiles img").first).to_be_visible(timeout=5 * MINUTES)
    expect(page.locator(".ik-table")).to_contain_text("<flask-0>", timeout=5 * MINUTES)
    browser.shot("6-learned")
    browser.check_fits()

    # 3 Mix: tokens of this run and of yesterday's.
    browser.tab("3 Mix")
    page.get_by_label("Take concepts of these runs").click()
    page.get_by_role("option", name="yesterday").click()
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Put flask of tabletop into the prompt").click()
    prompt = page.get_by_label("Prompt", exact=True)
    expect(prompt).to_have_value("a photo of {a}", timeout=MINUTES)
    page.get_by_role("button", name=re.compile("Put the colour of .* of yesterday into the prompt")).last.click()
    expect(prompt).to_have_value("a photo of {a} {b.colour}", timeout=MINUTES)
    page.get_by_label("Pictures", exact=True).fill("2")
    page.get_by_role("button", name="Draw").click()
    expect(page.locator(".ik-mixed img")).to_have_count(2, timeout=5 * MINUTES)
    expect(page.locator(".ik-progress")).to_be_hidden(timeout=MINUTES)
    browser.shot("7-mixed")
    browser.check_fits()
    assert sorted(path.name for path in (runs / "mixes").glob("*/*.png")) == ["0.png", "1.png", "sheet.png"]
    assert browser.faults == []


def test_on_a_phone_a_run_of_an_earlier_day_opens(chromium: playwright.Browser, url: str) -> None:
    browser = Browser(chromium.new_page(viewport={"width": 390, "height": 844}, has_touch=True), url)
    page = browser.page
    yesterday = page.get_by_role("button", name="yesterday")
    expect(yesterday).to_be_visible(timeout=MINUTES)
    browser.check_fits()
    browser.shot("1-start")
    yesterday.click()
    expect(page.locator(".ik-legend li")).to_have_count(2, timeout=MINUTES)
    browser.check_fits()
    browser.shot("2-opened")
    browser.tab("2 Learn")
    expect(page.locator(".ik-table")).to_be_visible(timeout=MINUTES)
    browser.check_fits()
    browser.shot("3-learned")
    browser.tab("3 Mix")
    page.get_by_role("button", name=re.compile("Put .* into the prompt")).first.click()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("a photo of {a}", timeout=MINUTES)
    page.get_by_label("Pictures", exact=True).fill("1")
    page.get_by_role("button", name="Draw").click()
    expect(page.locator(".ik-mixed img")).to_have_count(1, timeout=5 * MINUTES)
    browser.check_fits()
    browser.shot("4-mixed")
    assert browser.faults == []
