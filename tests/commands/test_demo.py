"""`llava-mod demo`: what reaches the page, and one sentence for each mistake. The page is in talking/test_page.py."""

import sys
import types

import pytest

from llava_mod_cli import main

PAGE = "llava_mod_hf.talking.page"
TEACHER = "embedded:tiny-teacher"


class StandIn:
    """For the page, without Gradio: keeps what it is given."""

    def __init__(self):
        self.blocked = False

    def build_page(self, models, sampling):
        self.models, self.sampling = models, sampling
        return self

    def serve(self, page, **options):
        self.options = options
        return "http://127.0.0.1:7860/"

    def block_thread(self):
        self.blocked = True


@pytest.fixture
def page(monkeypatch):
    """A page that is not served, and the models' loading, which is noted in `loaded`."""
    page, module = StandIn(), types.ModuleType(PAGE)
    module.build_page, module.serve, page.loaded = page.build_page, page.serve, []
    monkeypatch.setitem(sys.modules, PAGE, module)
    monkeypatch.setattr(
        "llava_mod_hf.commands.demo.load", lambda args, name: page.loaded.append((name, args.dtype)) or (name, None)
    )
    return page


def test_the_page_is_on_loopback_and_not_shared(page, capsys):
    assert main(["demo", TEACHER]) == 0
    assert page.options == {"host": "127.0.0.1", "port": 7860, "share": False}
    assert page.models == {TEACHER: (TEACHER, None)} and page.blocked
    assert capsys.readouterr().out == "The page is at http://127.0.0.1:7860/; Ctrl-C ends it.\n"


def test_options_reach_the_page(page):
    argv = [
        "demo",
        TEACHER,
        "--teacher",
        "embedded:scenes-teacher",
        "--host",
        "0.0.0.0",
        "--port",
        "0",
        "--share",
        "true",
    ]
    assert main([*argv, "--temperature", "0.5", "--dtype", "bfloat16"]) == 0
    assert page.options == {"host": "0.0.0.0", "port": 0, "share": True}
    assert list(page.models) == [TEACHER, "embedded:scenes-teacher"] and page.sampling.temperature == 0.5
    assert page.loaded == [(TEACHER, "bfloat16"), ("embedded:scenes-teacher", "bfloat16")]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--teacher", TEACHER], f"`teacher` is `{TEACHER}`, as `model` is"),
        (["--port", "70000"], "`port` is 70000: give one from 1 to 65535"),
        (["--top_k", "3"], "`top_k` is 3, which does nothing"),
    ],
)
def test_what_cannot_be_shown_is_refused(page, capsys, argv, message):
    assert main(["demo", TEACHER, *argv]) == 2
    assert message in capsys.readouterr().err and not page.loaded


def test_without_gradio_it_is_said_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, PAGE, raising=False)
    assert main(["demo", TEACHER]) == 2
    message = capsys.readouterr().err
    assert "install `llava-mod-hf[demo]`" in message and message.count("\n") == 1
