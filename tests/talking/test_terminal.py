"""The terminal: questions, commands, what is refused, and the session of docs/talking.md."""

import io
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from llava_mod_hf.data import easy_vqa
from llava_mod_hf.loading import load_model_and_processor
from llava_mod_hf.talking.conversation import Conversation, read_picture
from llava_mod_hf.talking.sampling import Sampling
from llava_mod_hf.talking.terminal import HELP, Terminal

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def terminal(teacher):
    return Terminal(Conversation(*teacher), Sampling(), out=io.StringIO())


@pytest.fixture
def file(tmp_path):
    """A picture of the test set, in a file whose name has a space."""
    path = tmp_path / "a picture.png"
    easy_vqa.load("questions", "test")[0]["images"][0].save(path)
    return path


def test_lines_of_a_pipe_are_answered_until_quit(terminal, file):
    lines = [f"/image {file}\n", "\n", "  what is the color of the circle?\n", "what shape is in the image?\n"]
    terminal.pipe([*lines, "/quit\n", "never\n"])
    said = terminal.out.getvalue().splitlines()
    assert len(said) == 2 and said[0] == "teal"
    turns = [(turn["role"], turn["content"][-1]["text"]) for turn in terminal.conversation.messages]
    assert turns[:2] == [("user", "what is the color of the circle?"), ("assistant", "teal")]
    assert turns[2:] == [("user", "what shape is in the image?"), ("assistant", said[1])]
    assert [part["type"] for part in terminal.conversation.messages[0]["content"]] == ["image", "text"]


def test_a_pipe_ends_at_the_first_line_that_is_refused(terminal):
    with pytest.raises(ValueError, match="There is no command `/imgae`"):
        terminal.pipe(["/imgae x.png", "is there a circle?"])
    assert terminal.out.getvalue() == ""


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/image", "`/image` stands without a picture"),
        ("/image no.png", "There is no picture `no.png`"),
        ("/reset all", "`/reset` stands with `all`"),
        ("/help", "There is no command `/help`: A line is a question; `/image PATH`"),
        ("what of <image>?", "The question holds `<image>`"),
    ],
)
def test_what_is_refused_changes_nothing(terminal, line, message):
    with pytest.raises(ValueError, match=message):
        terminal.take(line)
    assert terminal.conversation.messages == terminal.conversation.pictures == []


def test_reset_forgets_turns_and_pictures(terminal, file):
    terminal.pipe([f"/image '{file}'", "what shape is in the image?", f"/image {file}"])
    assert terminal.conversation.messages and terminal.conversation.pictures
    assert terminal.take("/reset")
    assert terminal.conversation.messages == terminal.conversation.pictures == []


def test_an_answer_that_is_cut_says_so(teacher):
    terminal = Terminal(Conversation(*teacher), Sampling(max_new_tokens=1), out=io.StringIO())
    terminal.take("what shape is in the image?")
    assert terminal.out.getvalue().endswith(" […]\n")


def typed(lines, terminal):
    """A `read` for a terminal's `interact` that shows what is typed, as a terminal does; an error is raised."""
    lines = iter(lines)

    def read(prompt):
        line = next(lines, EOFError())
        if isinstance(line, BaseException):
            raise line
        terminal.out.write(f"{prompt}{line}\n")
        return line

    return read


@pytest.mark.parametrize("end", [EOFError(), KeyboardInterrupt(), "/quit"])
def test_a_terminal_tells_what_is_refused_and_goes_on(terminal, end):
    terminal.interact(typed(["/image no.png", "is there a circle?", end, "never"], terminal))
    lines = terminal.out.getvalue().splitlines()
    assert lines[:4] == [
        HELP,
        "> /image no.png",
        "There is no picture `no.png`: give the path of a file.",
        "> is there a circle?",
    ]
    assert len(terminal.conversation.messages) == 2 and "never" not in terminal.out.getvalue()


def test_ctrl_c_leaves_a_question_out(terminal, monkeypatch):
    def interrupted(text):
        if text != HELP + "\n":
            monkeypatch.undo()
            raise KeyboardInterrupt

    monkeypatch.setattr(terminal, "_write", interrupted)
    terminal.interact(typed(["is there a circle?"], terminal))
    assert "Stopped: the question" in terminal.out.getvalue()
    assert terminal.conversation.messages == []


@pytest.fixture
def page():
    """The session of the page."""
    (session,) = re.findall(r"```text\n(A line is .*?)```", (DOCS / "talking.md").read_text(), flags=re.DOTALL)
    return session


def test_the_page_shows_what_is_said(page, monkeypatch):
    script = runpy.run_path(str(DOCS / "talk.py"))
    monkeypatch.chdir(DOCS.parent)
    assert read_picture("docs/scene.png").tobytes() == script["picture"]().tobytes()
    terminal = Terminal(
        Conversation(*load_model_and_processor("embedded:scenes-teacher")), Sampling(), out=io.StringIO()
    )
    terminal.conversation.show(read_picture("docs/scene.png"))
    terminal.interact(typed(script["LINES"], terminal))
    assert terminal.out.getvalue() == page


@pytest.mark.slow
def test_the_page_shows_what_a_real_terminal_shows(page, tmp_path):
    command = [sys.executable, str(DOCS / "talk.py"), "--output", str(tmp_path / "scene.png")]
    shown = subprocess.run(command, capture_output=True, text=True, cwd=DOCS.parent)
    assert (shown.returncode, shown.stdout) == (0, page)
