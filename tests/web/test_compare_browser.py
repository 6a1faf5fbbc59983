"""The page in a real browser: headless Chromium, as people use it."""

import json
import re
import shutil
import time
from importlib.util import find_spec
from pathlib import Path

import chromium
import pytest
from PIL import Image

import llava_fa
from llava_fa.world.samples import held_out_samples

if find_spec("gradio") is None:
    pytest.skip("needs the extra [web]: `make test-web`", allow_module_level=True)

pytestmark = pytest.mark.slow
MILLISECONDS = 60_000
TEXTS = ".prose p, .prose th, .prose td, .prose span, .prose h1, .prose h2, .prose b, .prose i, label span, #ask"


@pytest.fixture(scope="module")
def browser():
    with chromium.started() as found:
        yield found


@pytest.fixture(scope="module")
def endless(open_page, tmp_path_factory):
    """A page whose models do not end by themselves, so that there is something to stop."""
    folder = tmp_path_factory.mktemp("endless") / "endless"
    shutil.copytree(Path(llava_fa.__file__).parent / "world" / "tiny", folder)
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": 2}))
    return open_page(folder, folder, "--max-tokens", "900", "--timeout", "600")


class Visit:
    """One visitor's page, and what went on in it."""

    def __init__(self, browser, address, **context):
        self.context = browser.new_context(**context)
        self.page = self.context.new_page()
        self.page.set_default_timeout(MILLISECONDS)
        self.said, self.asked = [], []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("websocket", lambda socket: self.asked.append(socket.url))
        self.address = address
        self.page.goto(address)
        self.page.wait_for_selector("#ask")

    def pick(self, index):
        self.page.locator("#examples .gallery button, #examples button.gallery-item").nth(index).click()
        self.page.wait_for_selector("#right b")

    def ask(self):
        self.page.click("#ask")

    def text(self, place):
        return self.page.inner_text(place)

    def stands(self, pattern):
        self.page.wait_for_function(
            "(p) => new RegExp(p).test(document.querySelector('#standing').innerText)", arg=pattern
        )

    def ended(self):
        self.stands("differ|the same answer")
        self.page.wait_for_selector("#ask:not([disabled])")

    def tokens(self, side):
        found = re.search(r"Tokens written\s+(\d+)", self.text(f"#figures{side}"))
        return int(found[1]) if found else 0

    def elsewhere(self):
        return [url for url in self.asked if not url.startswith((self.address, "data:", "blob:"))]


@pytest.fixture
def visit(browser):
    visits = []

    def make(address, **context):
        visits.append(Visit(browser, address, **context))
        return visits[-1]

    yield make
    for one in visits:
        one.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("screen", chromium.SCREENS)
def test_an_example_is_answered_by_both(visit, page, screen, scheme, tmp_path):
    wide, high = chromium.SCREENS[screen]
    visitor = visit(page, viewport={"width": wide, "height": high}, color_scheme=scheme)
    visitor.pick(2)
    assert visitor.page.input_value("#question textarea") == "How many purple objects are there?"
    visitor.ask()
    visitor.ended()
    assert "Asked: How many purple objects are there?" in visitor.text("#standing")
    assert visitor.text("#answer0") == "1"
    for side in (0, 1):
        figures = visitor.text(f"#figures{side}")
        assert re.search(r"First token after\s+[\d.]+ m?s", figures)
        assert re.search(r"Speed after the first\s+[\d.]+ tokens/s", figures)
        assert re.search(r"Whole answer\s+[\d.]+ m?s", figures)
        assert "64 of them the picture" in figures
    assert "5.9× smaller" in visitor.text("#figures1")
    assert "bits per weight" in visitor.text("#side1")
    assert "with both models in it" in visitor.text("#memory")
    # nobody else is asked for anything, and the browser has nothing to complain of
    assert visitor.elsewhere() == []
    assert visitor.said == []
    assert visitor.page.evaluate("document.documentElement.scrollWidth") <= wide
    assert visitor.page.evaluate(chromium.CONTRAST, TEXTS) >= 4.5
    columns = [visitor.page.locator(f"#side{side}").bounding_box() for side in (0, 1)]
    assert (columns[0]["y"] == columns[1]["y"]) == (screen == "wide")  # beside each other, or one below the other
    visitor.page.screenshot(path=tmp_path / f"{screen}-{scheme}.png", full_page=True)


def test_a_picture_of_ones_own(visit, page, tmp_path):
    sample = next(s for s in held_out_samples(9) if s.question.task == "existence")
    sample.image.save(tmp_path / "mine.png")
    visitor = visit(page)
    visitor.pick(0)
    visitor.page.click("#picture button[aria-label='Remove Image']")
    visitor.page.wait_for_selector("#right b", state="detached")  # the example's answer is nobody's any more
    visitor.page.set_input_files("#picture input[type=file]", tmp_path / "mine.png")
    visitor.page.wait_for_selector("#picture img")
    visitor.page.fill("#question textarea", sample.question.text)
    visitor.page.press("#question textarea", "Shift+Enter")
    visitor.ended()
    assert visitor.text("#answer0") == sample.question.answer


def test_what_is_wrong_is_said(visit, page, tmp_path):
    visitor = visit(page)
    visitor.ask()
    visitor.stands("There is no picture. Upload one, or pick an example.")
    Image.new("RGB", (300, 300)).save(tmp_path / "large.png")
    visitor.page.set_input_files("#picture input[type=file]", tmp_path / "large.png")
    visitor.page.wait_for_selector("#picture img")
    visitor.ask()
    visitor.stands("There is no question|more than 40000 pixels")
    visitor.page.fill("#question textarea", "What is it?")
    visitor.ask()
    visitor.stands("more than 40000 pixels")
    visitor.page.click("#picture button[aria-label='Remove Image']")
    (tmp_path / "heavy.png").write_bytes(bytes(60_000))
    visitor.page.set_input_files("#picture input[type=file]", tmp_path / "heavy.png")
    visitor.page.wait_for_selector(".toast-body, .toast-wrap")
    assert re.search("size|large", visitor.text(".toast-wrap"), re.IGNORECASE)


def test_hostile_text_is_text(visit, page):
    visitor = visit(page)
    visitor.pick(0)
    hostile = "<img src=x onerror=\"document.title='gone'\"> ${1+1} {{2+2}} <b>what</b>?"
    visitor.page.fill("#question textarea", hostile)
    visitor.ask()
    visitor.ended()
    assert f"Asked: {hostile}" in visitor.text("#standing")
    assert visitor.page.title() == "LLaVA-FA: compare"


def test_visual_tokens_are_chosen_for_each_model(visit, page):
    visitor = visit(page)
    visitor.pick(2)
    slider = visitor.page.locator("#tokens1 input[type=range]")
    slider.focus()
    slider.press("ArrowLeft")
    slider.press("ArrowLeft")
    visitor.page.wait_for_function("/Visual tokens: 4 \\(pooled/.test(document.querySelector('#tokens1').innerText)")
    visitor.ask()
    visitor.ended()
    assert "64 of them the picture" in visitor.text("#figures0")
    assert "4 of them the picture" in visitor.text("#figures1")
    assert "64 of them" not in visitor.text("#figures1")


def test_both_at_once_and_a_shorter_answer(visit, page):
    visitor = visit(page)
    visitor.pick(8)
    visitor.page.click("#settings button")
    visitor.page.fill("#longest input[type=number]", "5")
    visitor.page.press("#longest input[type=number]", "Tab")
    visitor.page.check("#together input")
    visitor.ask()
    visitor.ended()
    assert [visitor.tokens(side) for side in (0, 1)] == [5, 5]
    for side in (0, 1):
        assert visitor.text(f"#figures{side}").count("shared the machine") == 3
        assert "cut at the longest answer" in visitor.text(f"#answer{side}")


def test_answers_stream_and_stop_and_can_be_asked_anew(visit, endless):
    visitor = visit(endless)
    visitor.pick(8)
    for _ in range(2):
        visitor.ask()
        visitor.stands("The original model is answering")
        visitor.page.wait_for_selector("#ask[disabled]")
        visitor.page.wait_for_function("document.querySelector('#answer0').innerText.length > 20")
        visitor.page.click("#stop")
        visitor.stands("Stopped.")
        visitor.page.wait_for_selector("#ask:not([disabled])")
        assert 4 < visitor.tokens(0) < 900
        assert visitor.tokens(1) == 0
        assert len(visitor.text("#answer0")) > 20  # what there was of it stays


def test_others_wait_their_turn_and_leaving_makes_room(visit, endless):
    first, second, third = (visit(endless) for _ in range(3))
    for index, visitor in enumerate((first, second, third)):
        visitor.pick(6 + index)
    first.ask()
    first.stands("The original model is answering")
    second.ask()
    second.stands("Waiting: 1 before you.")
    third.ask()
    third.stands("Waiting: 2 before you.")
    second.page.click("#stop")
    second.stands("Stopped.")
    third.stands("Waiting: 1 before you.")
    rate = float(re.search(r"([\d.]+) tokens/s", first.text("#figures0"))[1])
    left = (2 * 900 - first.tokens(0)) / rate
    began = time.monotonic()
    first.context.close()  # which ends what nobody waits for any more
    third.stands("The original model is answering")
    assert time.monotonic() - began < left / 2
    third.page.wait_for_function("document.querySelector('#answer0').innerText.length > 20")
    assert "Asked: Describe the image." in third.text("#standing")
    assert third.tokens(0) > 0
