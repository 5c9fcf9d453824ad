"""The site in a real browser: its pages lead to each other, a search finds an option, and nobody else is asked."""

from urllib.parse import urlsplit

import pytest

from helpers.browser import browsing, requested, screenshot, served
from helpers.site import build_site

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Where it is served."""
    folder = tmp_path_factory.mktemp("site")
    build_site(folder)
    with served(folder) as address:
        yield address


@pytest.fixture
def browser(address, tmp_path):
    with browsing(tmp_path / "profile", address) as browser:
        yield browser


def heading(browser):
    return browser.find_element("css selector", "article h1").text.rstrip("¶")


def test_the_first_page_is_as_it_should_look(browser, tmp_path):
    assert heading(browser) == "llava_mod_hf"
    images = "return Array.from(document.querySelectorAll('article img')).map(image => image.naturalWidth)"
    sizes = browser.execute_script(images)
    assert len(sizes) == 2 and min(sizes) > 30
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    assert screenshot(browser, "site.png", tmp_path).stat().st_size > 10_000
    asked = requested(browser)
    assert len(asked) > 5 and {urlsplit(url).hostname for url in asked} == {"127.0.0.1"}


def test_the_navigation_leads_to_the_reference(browser):
    browser.find_element("css selector", ".md-nav--primary a[href='reference/']").click()
    assert heading(browser) == "Reference"
    browser.find_element("css selector", ".md-sidebar--secondary a[href$='.MimicTrainer']").click()
    target = browser.find_element("css selector", "[id='llava_mod_hf.training.mimic_trainer.MimicTrainer']")
    assert abs(browser.execute_script("return arguments[0].getBoundingClientRect().top", target)) < 200


def test_a_search_finds_the_pages_of_an_option(browser):
    browser.find_element("css selector", "label.md-search__icon, .md-search__input").click()
    browser.find_element("css selector", ".md-search__input").send_keys("router_bias_update")
    browser.find_element("css selector", ".md-search-result__link")
    links = browser.find_elements("css selector", ".md-search-result__link")
    pages = {urlsplit(link.get_property("href")).path for link in links}
    assert pages >= {"/watching/", "/reference/"}
