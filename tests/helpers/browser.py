"""A real headless Chromium for pages, and where its screenshots go."""

import json
import os
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Chromium asks the network for things of its own at every start
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --hide-scrollbars --force-device-scale-factor=1"
)


def lacking(what):
    """Skips a test, or fails it where `make test-demo` promises that nothing is lacking."""
    reason = f"{what} is not installed: `make test-demo` says how"
    pytest.fail(reason) if os.environ.get("NEEDS_BROWSER") else pytest.skip(reason)


def start_browser(profile, *, width=1280, height=900):
    """
    A browser without a window.

    Args:
        profile (`Path`): an empty folder.
        width, height (`int`, *optional*): of its window, in pixels.

    Returns:
        `selenium.webdriver.Chrome`.
    """
    try:
        from selenium import webdriver
    except ImportError:
        lacking("selenium")
    chromium, driver = (shutil.which(name) for name in ("chromium", "chromedriver"))
    if not chromium or not driver:
        lacking("Debian's `chromium` with `chromium-driver`")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS.split(), f"--user-data-dir={profile}", f"--window-size={width},{height}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))


def requested(browser):
    """`set[str]`: the addresses that pages asked for since the last call, `data:` and the like apart."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return {url for url in urls if url.startswith(("http", "ws"))}


def screenshot(browser, name, folder):
    """Saves what the window shows, as `name` in the repository's folder `SCREENSHOTS`, or else in another."""
    path = (ROOT / os.environ["SCREENSHOTS"] if os.environ.get("SCREENSHOTS") else folder) / name
    assert browser.save_screenshot(str(path))
    return path
