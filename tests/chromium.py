"""Headless Chromium for the tests that look at pages."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

SCREENS = {"wide": (1280, 900), "narrow": (360, 800)}
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@contextmanager
def started() -> Iterator:
    """Playwright's own Chromium, or the system's."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: `make browser` installs it")
    with playwright.sync_playwright() as running:
        there = [path for name in BROWSERS if (path := shutil.which(name))]
        try:
            browser = running.chromium.launch(args=["--no-sandbox"], executable_path=there[0] if there else None)
        except playwright.Error as error:
            pytest.skip(f"no Chromium that starts ({str(error).splitlines()[0]}): `make browser` installs one")
        yield browser
        browser.close()


CONTRAST = """(texts) => {
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
  for (const e of document.querySelectorAll(texts)) {
    const [a, b] = [luminance(getComputedStyle(e).color), luminance(ground(e))].sort((x, y) => y - x);
    least = Math.min(least, (a + 0.05) / (b + 0.05));
  }
  return least;
}"""
"""Of a selector: the least contrast of ink and ground among its elements, by WCAG, whose AA asks for 4.5."""
