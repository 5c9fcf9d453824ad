"""The page of `llava-mod demo` in a real browser: upload, ask, read the answer; and a picture that is none."""

import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from PIL import Image

from helpers.browser import SECONDS, browsing, lacking, requested, screenshot
from llava_mod_hf.data import scene_rows
from llava_mod_hf.loading import load_model_and_processor
from llava_mod_hf.students.upcycling import upcycle
from llava_mod_hf.talking.answers import Answer
from llava_mod_hf.talking.conversation import Conversation
from llava_mod_hf.talking.expert_choices import token_experts
from llava_mod_hf.talking.sampling import Sampling

pytestmark = pytest.mark.slow

QUESTION = "describe the picture."


@pytest.fixture(scope="module")
def models():
    """By title: the scenes' teacher with experts whose routers are untrained, and the one that saw no wrong answer."""
    teacher, processor = load_model_and_processor("embedded:scenes-teacher")
    clean = load_model_and_processor("embedded:scenes-clean-teacher")
    return {"student (upcycled scenes-teacher)": (upcycle(teacher), processor), "teacher (scenes-clean-teacher)": clean}


@pytest.fixture(scope="module")
def page(models, tmp_path_factory):
    """The page of both models."""
    try:
        from llava_mod_hf.talking.page import build_page
    except ImportError:
        lacking("gradio")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))
        yield build_page(models, Sampling(max_new_tokens=64))


@pytest.fixture(scope="module")
def address(page):
    """Where it is served."""
    from llava_mod_hf.talking.page import serve

    yield serve(page, host="127.0.0.1", port=0, share=False)
    page.close()


@pytest.fixture
def browser(address, tmp_path):
    with browsing(tmp_path / "profile", address, width=1440, height=1080) as browser:
        yield browser


@pytest.fixture
def picture():
    """A test picture of the scenes, as docs/talking.md shows it."""
    return scene_rows.picture(3, "conversation", "test", 0).resize((192, 192), Image.Resampling.NEAREST)


def find(browser, selector):
    return browser.find_element("css selector", selector)


def wait_for(browser, selector, text):
    """The element, once it has text that matches."""
    from selenium.webdriver.support.wait import WebDriverWait

    def there(browser):
        found = browser.find_elements("css selector", selector)
        return next((each for each in found if re.search(text, each.text)), None)

    return WebDriverWait(browser, SECONDS).until(there)


def ask(browser, file, question=QUESTION):
    find(browser, "#picture input[type=file]").send_keys(str(file))
    find(browser, "#picture img")  # the upload is there
    find(browser, "#question textarea").send_keys(question)
    find(browser, "#ask").click()


def test_a_picture_a_question_and_the_answers_of_both(browser, models, picture, tmp_path):
    picture.save(tmp_path / "scene.png")
    ask(browser, tmp_path / "scene.png")
    wait_for(browser, "#figures-1", "tokens per second")
    answers = []
    for number, (model, processor) in enumerate(models.values()):
        conversation = Conversation(model, processor)
        conversation.show(picture)
        answers.append(Answer(conversation, QUESTION, Sampling(), watch_experts=True))
        text = "".join(answers[-1])
        assert find(browser, f"#answer-{number} textarea").get_property("value") == text != ""
        figures = find(browser, f"#figures-{number}").text
        assert re.fullmatch(rf"{len(answers[-1].tokens)} tokens in [\d.]+ s, [\d.]+ tokens per second", figures)

    rows = browser.find_elements("css selector", "#experts-0 table.tokens tr")
    cells = [[cell.get_property("textContent") for cell in row.find_elements("css selector", "td")] for row in rows[1:]]
    words = [row for row in token_experts(answers[0]) if row.part != "picture"]
    layers = list(answers[0].experts)
    assert cells == [[", ".join(map(str, word.experts[place])) for word in words] for place in range(len(layers))]
    assert browser.execute_script("return document.querySelectorAll('#experts-1 table').length") == 0

    assert screenshot(browser, "demo.png", tmp_path).stat().st_size > 10_000
    asked = requested(browser)
    assert len(asked) > 5 and {urlsplit(url).hostname for url in asked} == {"127.0.0.1"}


def test_a_picture_that_is_none(browser, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    ask(browser, tmp_path / "broken.png")
    message = wait_for(browser, ".toast-body", "whole image").text
    assert "`broken.png` is not a whole image" in message and str(tmp_path) not in message
    assert find(browser, "#answer-0 textarea").get_property("value") == ""


def test_the_page_listens_on_loopback_alone(address):
    taken = {line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines()[1:] if line.split()[3] == "0A"}
    listening = {place.split(":")[0] for place in taken if int(place.split(":")[1], 16) == urlsplit(address).port}
    assert listening == {"0100007F"}  # 127.0.0.1


def test_nothing_is_told_and_nothing_shared(address, page):
    from gradio import analytics

    assert not analytics.analytics_enabled() and not page.analytics_enabled
    assert page.share is False and page.share_url is None and not page.run_history


def test_the_command_serves_the_page_without_a_network_until_it_is_ended(page):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "llava_mod_cli", "demo", "embedded:tiny-teacher", "--port", "0"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
        # what a shell starts in the background ignores it, and hands that on
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        address = re.fullmatch(
            r"The page is at (http://127\.0\.0\.1:\d+/); Ctrl-C ends it\.\n", process.stdout.readline()
        )
        with urllib.request.urlopen(address[1]) as answer:
            assert answer.status == 200 and b"embedded:tiny-teacher" in answer.read()
        process.send_signal(signal.SIGINT)
        assert process.wait(SECONDS) == 0
    finally:
        process.kill()


def test_a_port_that_is_taken(address, models):
    from llava_mod_hf.talking.page import build_page, serve

    port = urlsplit(address).port
    with pytest.raises(ValueError, match=f"cannot be served on `127.0.0.1`, port {port} .*`port` 0 for a free one"):
        serve(build_page(models, Sampling()), host="127.0.0.1", port=port, share=False)
