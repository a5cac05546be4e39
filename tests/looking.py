"""Pages looked at in a real browser: Debian's chromium without a window, driven by selenium."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

WAIT = 180
"""Seconds that a page may take on a busy machine."""


@contextmanager
def open_browser() -> Iterator[Any]:
    """A browser; the test is skipped where there is none."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is missing: pip install -e '.[dev]'")
    paths = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    if not all(paths.values()):
        pytest.skip("chromium is missing: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = paths["chromium"]
    for option in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1600,1400"):
        options.add_argument(option)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(paths["chromedriver"]))
    driver.set_page_load_timeout(WAIT)
    driver.set_script_timeout(WAIT)
    try:
        yield driver
    finally:
        driver.quit()


def wait_for(browser: Any, found: Callable[[], Any], what: str) -> Any:
    """What ``found`` gives as soon as it is something."""
    deadline = time.monotonic() + WAIT
    while time.monotonic() < deadline:
        value = found()
        if value:
            return value
        time.sleep(0.5)
    keep = os.environ.get("ANYFLOW_SCREENSHOTS")
    if keep:
        browser.save_screenshot(str(Path(keep) / "failed.png"))
    raise AssertionError(f"{what} did not appear; the page says: {text_of(browser)[:1500]}")


def text_of(browser: Any) -> str:
    return str(browser.execute_script("return document.body ? document.body.innerText : ''"))


def keep_picture(browser: Any, name: str) -> None:
    """A screenshot for people, where ANYFLOW_SCREENSHOTS names a folder."""
    folder = os.environ.get("ANYFLOW_SCREENSHOTS")
    if folder:
        browser.save_screenshot(str(Path(folder) / f"{name}.png"))
