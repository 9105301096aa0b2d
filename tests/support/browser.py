"""A headless Chromium for the tests of pages; they are skipped if there is none."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_FLAGS = """--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run
--disable-background-networking --disable-component-update --disable-sync""".split()


@contextmanager
def open_browser(folder: Path) -> Iterator[Any]:
    """Yield a driver; ``folder`` takes the browser's profile."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install fastcam[test]")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        # If everything has to be tested, a missing browser is a failure.
        give_up = pytest.fail if os.environ.get("FASTCAM_TEST_BROWSER") == "required" else pytest.skip
        give_up("needs a browser: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in (*_FLAGS, f"--user-data-dir={folder}"):
        options.add_argument(flag)
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield browser
    finally:
        browser.quit()
