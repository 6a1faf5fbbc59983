"""The report in a real browser: headless Chromium, wide and narrow, light and dark."""

import datetime
import shutil

import helpers
import pytest
import torch

import llava_fa
from llava_fa.eval.report.collect import Settings, collect
from llava_fa.eval.report.page import page

SCREENS = {"wide": (1280, 900), "narrow": (360, 800)}
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser():
    """Playwright's own Chromium, or the system's."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: `make browser` installs it")
    with playwright.sync_playwright() as running:
        there = [path for name in BROWSERS if (path := shutil.which(name))]
        try:
            started = running.chromium.launch(args=["--no-sandbox"], executable_path=there[0] if there else None)
        except playwright.Error as error:
            pytest.skip(f"no Chromium that starts ({str(error).splitlines()[0]}): `make browser` installs one")
        yield started
        started.close()


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
@pytest.mark.parametrize("screen", SCREENS)
def test_in_chromium(browser, report, screen, scheme, tmp_path):
    wide, high = SCREENS[screen]
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
    assert opened.evaluate(CONTRAST) >= 4.5
    opened.screenshot(path=tmp_path / f"{screen}-{scheme}.png", full_page=True)
    context.close()


PICTURES = """async () => {
  await Promise.all([...document.images].map(i => { i.loading = 'eager'; return i.decode(); }));
  return document.images.length;
}"""
CONTRAST = """() => {
  const luminance = (color) => {
    const [r, g, b] = color.match(/[\\d.]+/g).map(Number).map(v => v / 255)
      .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const color = getComputedStyle(e).backgroundColor;
      if (!/, 0\\)$/.test(color) && color !== 'transparent') return color;
    }
    return 'rgb(255, 255, 255)';
  };
  let least = 21;
  const texts = 'p, li, td, th, dt, dd, summary, figcaption, h1, h2, h3, h4, a, pre, caption';
  for (const e of document.querySelectorAll(texts)) {
    const [a, b] = [luminance(getComputedStyle(e).color), luminance(ground(e))].sort((x, y) => y - x);
    least = Math.min(least, (a + 0.05) / (b + 0.05));
  }
  return least;
}"""
