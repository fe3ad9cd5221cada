"""A headless Chromium for tests of pages. CI installs it, so that there a missing browser is an error."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
ARGUMENTS = ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--force-device-scale-factor=1")


@contextmanager
def chromium(width: int = 1000, height: int = 800) -> Iterator:
    """Yield a driver; skip the test without a browser, except in CI."""
    binary, driver = next(filter(None, map(shutil.which, BROWSERS)), None), shutil.which("chromedriver")
    if not (binary and driver):
        missing = "needs a Chromium and its chromedriver"
        pytest.fail(missing) if os.environ.get("CI") else pytest.skip(missing)
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in (*ARGUMENTS, f"--window-size={width},{height}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield opened
    finally:
        opened.quit()


def resize(driver, width: int, height: int, dark: bool = False) -> None:
    """Emulate a screen of another size, and its colour scheme."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})


def scroll_panes(driver) -> list[list[list[int]]]:
    """Scroll the first pane in view twice, before the second has followed; then the second; return the places."""
    driver.set_script_timeout(10)
    return driver.execute_async_script("""
        const panes = [...document.querySelectorAll(".pane")].filter(pane => pane.clientWidth), [first, second] = panes;
        const places = [], done = arguments[0];
        const place = () => panes.map(pane => [pane.scrollLeft, pane.scrollTop]);
        const later = (then, frames = 4) => frames ? requestAnimationFrame(() => later(then, frames - 1)) : then();
        const still = then => {  // keys scroll smoothly
          const before = String(place());
          later(() => String(place()) === before ? then() : still(then), 20);
        };
        still(() => {
          first.addEventListener("scroll", () => {
            first.scrollTo(7, 9);
            later(() => {
              places.push(place());
              second.scrollTo(60, 9);
              later(() => { second.scrollTo(7, 9); later(() => done([...places, place()])); });
            });
          }, { once: true });
          first.scrollTo(30, 40);
        });""")


def serious(driver) -> list[str]:
    """Run axe-core on the page; return its findings of serious and critical impact."""
    from axe_core_python.selenium import Axe

    violations = Axe().run(driver)["violations"]
    return [
        f"{found['id']}: {[node['html'][:200] for node in found['nodes']]}"
        for found in violations
        if found["impact"] in ("serious", "critical")
    ]
