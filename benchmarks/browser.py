"""A real browser for what shows pages: the viewer's benchmark, its screenshots, its tests."""

from __future__ import annotations

import shutil
from typing import Any

from client.errors import ClientError

SETTLED = """
const done = arguments[arguments.length - 1];
const look = (quiet) => {
  const panes = globalThis.viewer?.panes || [];
  const still = panes.length && panes.every(({ viewer: { viewport: v, world } }) =>
    world.getItemAt(0)?.getFullyLoaded() &&
    [v.centerSpringX, v.centerSpringY, v.zoomSpring, v.degreesSpring].every((one) => one.isAtTargetValue()));
  quiet >= 3 ? done(true) : requestAnimationFrame(() => look(still ? quiet + 1 : 0));
};
look(0);
"""
"""Waits until OpenSeadragon says of every pane that all of it is loaded and nothing moves any more."""


def open_browser(size: tuple[int, int] = (1400, 900)) -> Any:
    """Debian's chromium without a screen, driven through its own chromedriver.

    Raises:
        ClientError: they are not installed.
    """
    paths = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in paths:
        raise ClientError("chromium and chromedriver are missing: apt-get install chromium chromium-driver")
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    options = ChromeOptions()
    options.binary_location = str(paths[0])
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    browser = Chrome(options=options, service=Service(str(paths[1])))
    browser.set_window_size(*size)
    browser.set_script_timeout(120)
    return browser
