"""A headless Chromium for the tests of the page. No page may log an error or send a request to another server."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for name in NAMES if (path := shutil.which(name))), None)
MISSING = "no Chromium: make browser, as root on Debian"


@contextmanager
def chromium() -> Iterator[Browser]:
    """Start the system's browser. Playwright downloads none of its own."""
    assert CHROMIUM is not None, MISSING
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []  # root cannot use the sandbox
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def opened(browser: Browser, url: str, *, refusals: bool = False, **options: Any) -> Iterator[Page]:
    """Open the page in a new profile. `refusals`: the server will refuse something, which Chromium logs as an error."""
    complaints: list[str] = []
    with browser.new_context(**options) as context:
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda sent: None if sent.url.startswith(url) else complaints.append(sent.url))
        page.goto(url)
        yield page
    expected = "Failed to load resource: the server responded with a status of 4"
    assert [one for one in complaints if not (refusals and one.startswith(expected))] == []
