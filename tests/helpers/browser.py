"""A real headless Chromium for pages, and where its screenshots go."""

import contextlib
import functools
import json
import os
import shutil
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SECONDS = 60  # for a page on a busy machine

# Chromium asks the network for things of its own at every start
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --hide-scrollbars --force-device-scale-factor=1"
)


def lacking(what):
    """Skips a test, or fails it where `make test-demo` promises that nothing is lacking."""
    reason = f"{what} is not installed: `make test-demo` says how"
    pytest.fail(reason) if os.environ.get("NEEDS_BROWSER") else pytest.skip(reason)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        """Not on standard error."""


@contextlib.contextmanager
def served(folder):
    """The address of a static server of a folder."""
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()


@contextlib.contextmanager
def browsing(profile, address=None, *, width=1280, height=900):
    """
    A browser without a window, ended afterwards.

    Args:
        profile (`Path`): an empty folder.
        address (`str`, *optional*): the page that is opened.
        width, height (`int`, *optional*): of its window, in pixels.

    Yields:
        `selenium.webdriver.Chrome`: of an address it waits as long as [`SECONDS`] for what is looked for.
    """
    browser = _start(profile, width, height)
    try:
        if address is not None:
            browser.implicitly_wait(SECONDS)
            browser.get(address)
        yield browser
    finally:
        browser.quit()


def _start(profile, width, height):
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
