"""`llava-mod chat` through a pipe: answers, options, and one sentence for each mistake."""

import io
import json
import shutil

import pytest

from llava_mod_cli import main
from llava_mod_hf.data import easy_vqa
from llava_mod_hf.evaluation.answers import generate_answers
from llava_mod_hf.loading import load_model_and_processor, resolve

TEACHER = "embedded:tiny-teacher"


@pytest.fixture(scope="module")
def rows():
    return easy_vqa.load("questions", "test").select(range(2))


@pytest.fixture
def picture(rows, tmp_path):
    path = tmp_path / "picture.png"
    rows[0]["images"][0].save(path)
    return path


@pytest.fixture
def chat(monkeypatch, capsys):
    """`chat(*argv, lines=…)`: exit code, standard output and standard error."""

    def chat(*argv, lines="what shape is in the image?\n"):
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        code = main(["chat", *map(str, argv)])
        return code, *capsys.readouterr()

    return chat


def test_a_question_a_line(chat, rows, picture):
    expected = generate_answers(*load_model_and_processor(TEACHER), rows)
    lines = f"{rows[0]['question']}\n/reset\n/image {picture}\n{rows[0]['question']}\n"
    assert chat(TEACHER, "--image", picture, lines=lines)[:2] == (0, f"{expected[0]}\n{expected[0]}\n")


def test_sampling_reaches_the_answer(chat, picture):
    cut = chat(TEACHER, "--image", picture, "--max_new_tokens", "1")[1]
    assert cut.endswith(" […]\n")
    assert chat(TEACHER, "--image", picture)[1] != chat(TEACHER, "--image", picture, "--temperature", "20")[1]


def test_dtype_and_device_reach_the_model(chat, monkeypatch):
    seen = {}

    def load(name, **options):
        seen.update(options, name=name)
        return load_model_and_processor(name)

    monkeypatch.setattr("llava_mod_hf.commands.chat.load_model_and_processor", load)
    assert chat(TEACHER, "--dtype", "bfloat16", "--device", "cpu", lines="")[0] == 0
    assert seen == {"name": TEACHER, "dtype": "bfloat16", "device": "cpu", "trust_remote_code": False}
    chat(TEACHER, "--trust_remote_code", "true", lines="")
    assert seen["trust_remote_code"] is True


def refused(chat, *argv, lines="what?\n"):
    """The one sentence that is told, after nothing was said."""
    code, out, err = chat(*argv, lines=lines)
    told = [line for line in err.splitlines() if line and not line.startswith("Loading weights:")]
    assert (code, out, len(told)) == (2, "", 1), err
    return told[0]


def test_a_picture_that_is_missing_or_broken(chat, tmp_path):
    assert "There is no picture `no.png`: give the path" in refused(chat, TEACHER, "--image", "no.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    assert "broken.png` is not a whole image" in refused(chat, TEACHER, "--image", tmp_path / "broken.png")
    assert "broken.png` is not a whole image" in refused(chat, TEACHER, lines=f"/image {tmp_path / 'broken.png'}\n")


def test_a_conversation_that_is_too_long(chat):
    message = refused(chat, TEACHER, lines="what shape is in the image? " * 200 + "\n")
    assert "tokens, pictures included, and the model reads 512: begin anew" in message


def test_a_model_without_a_processor(chat, tmp_path):
    folder = shutil.copytree(resolve(TEACHER), tmp_path / "model")
    (folder / "processor_config.json").unlink()
    assert "comes without a processor (" in refused(chat, folder)


def test_a_model_that_sees_nothing(chat):
    message = refused(chat, "embedded:tiny-student-lm")
    assert "`embedded:tiny-student-lm` is no vision-language model" in message


def test_code_of_a_model_does_not_run_unasked(chat, tmp_path):
    """And the line that is a question is not taken for an answer to transformers' own."""
    code = {"AutoConfig": "strange.Config", "AutoModelForImageTextToText": "strange.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "strange", "auto_map": code}))
    (tmp_path / "strange.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    message = refused(chat, tmp_path, lines="y\n")
    assert "brings code of its own: read it, and give `trust_remote_code: true` if it may run" in message
    assert not (tmp_path / "ran").exists()


def test_an_option_without_an_effect(chat):
    assert "`top_p` is 0.5, which does nothing" in refused(chat, TEACHER, "--top_p", "0.5")
