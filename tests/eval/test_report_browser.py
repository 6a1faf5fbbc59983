"""The report in a real browser: headless Chromium, wide and narrow, light and dark."""

import datetime

import chromium
import helpers
import pytest
import torch

import llava_fa
from llava_fa.eval.report.collect import Settings, collect
from llava_fa.eval.report.page import page

TEXTS = "p, li, td, th, dt, dd, summary, figcaption, h1, h2, h3, h4, a, pre, caption"


@pytest.fixture(scope="module")
def browser():
    with chromium.started() as found:
        yield found


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    place = tmp_path_factory.mktemp("browser")
    original = helpers.save_llava(place / "original", dtype=torch.bfloat16)
    llava_fa.compress(original, place / "three", llava_fa.FourierConfig(bits=3, rank=2))
    llava_fa.compress(original, place / "mixed", budget=llava_fa.Budget(bits=2.9))
    names = [str(place / name) for name in ("three", "mixed")]
    found = collect(names, str(original), Settings(limit=9, divergence=100), place / "work")
    (place / "report.html").write_text(page(found, ["llava-fa report three mixed"], datetime.date(2026, 11, 21)))
    return place / "report.html"


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("screen", chromium.SCREENS)
def test_in_chromium(browser, report, screen, scheme, tmp_path):
    wide, high = chromium.SCREENS[screen]
    context = browser.new_context(viewport={"width": wide, "height": high}, color_scheme=scheme)
    opened = context.new_page()
    said, asked = [], []
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto(report.as_uri())
    opened.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert opened.evaluate(PICTURES) >= 20
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [report.as_uri()]
    # nothing but the boxes that scroll by themselves is wider than the screen
    assert opened.evaluate("document.documentElement.scrollWidth") <= wide
    assert opened.evaluate(
        "[...document.querySelectorAll('svg[role=img]')].every(s => s.getBoundingClientRect().width > 0)"
    )
    # ink and ground of every text are apart as WCAG's AA asks (4.5), in both schemes
    assert opened.evaluate(chromium.CONTRAST, TEXTS) >= 4.5
    opened.screenshot(path=tmp_path / f"{screen}-{scheme}.png", full_page=True)
    context.close()


PICTURES = """async () => {
  await Promise.all([...document.images].map(i => { i.loading = 'eager'; return i.decode(); }));
  return document.images.length;
}"""
