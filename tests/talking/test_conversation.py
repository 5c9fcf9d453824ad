"""What a model reads of a conversation, and what it refuses to read."""

import pytest
from PIL import Image

from llava_mod_hf.talking.conversation import Conversation, read_picture


@pytest.fixture
def conversation(make_student, processor):
    return Conversation(make_student(), processor)


def read_text(conversation, question):
    return conversation.processor.decode(conversation.read(question)["input_ids"][0])


def test_a_picture_stands_before_the_question_that_follows_it(conversation, processor, picture):
    image = "<image>" * 16
    conversation.show(picture)
    assert read_text(conversation, "what?") == f"<|user|>{image}what?<|assistant|>"
    assert read_text(conversation, "where?") == f"<|user|>{image}where?<|assistant|>"  # the first was only read
    conversation.answered("where?", "here")
    assert read_text(conversation, "why?") == f"<|user|>{image}where?<|assistant|>here<|end|><|user|>why?<|assistant|>"
    conversation.show(picture)
    conversation.show(picture)
    assert read_text(conversation, "why?").endswith(f"here<|end|><|user|>{image}{image}why?<|assistant|>")
    assert conversation.read("why?")["pixel_values"].shape[0] == 3
    conversation.reset()
    assert read_text(conversation, "what?") == "<|user|>what?<|assistant|>"


def test_a_mark_in_a_question_is_refused_and_one_in_an_answer_is_left_out(conversation):
    with pytest.raises(ValueError, match="The question holds `<image>`"):
        conversation.read("what of <image>?")
    conversation.answered("what?", "a <|user|>hat")
    assert read_text(conversation, "why?") == "<|user|>what?<|assistant|>a hat<|end|><|user|>why?<|assistant|>"


def test_a_conversation_is_as_long_as_the_context(conversation, picture):
    conversation.show(picture)
    tokens = conversation.read("what?")["input_ids"].shape[1]
    conversation.limit = tokens + 1
    assert conversation.room(conversation.read("what?")) == 1
    conversation.limit = tokens
    with pytest.raises(ValueError, match=f"conversation has {tokens} tokens, .* and the model reads {tokens}:"):
        conversation.read("what?")


def test_a_processor_without_a_template_is_refused(make_student, processor, monkeypatch):
    monkeypatch.setattr(processor, "chat_template", None)
    with pytest.raises(ValueError, match="no chat template"):
        Conversation(make_student(), processor)


def test_a_picture_is_upright_and_of_three_colours(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # to be turned by a quarter
    Image.new("L", (8, 4)).save(tmp_path / "turned.jpg", exif=exif)
    assert (read_picture(tmp_path / "turned.jpg").size, read_picture(tmp_path / "turned.jpg").mode) == ((4, 8), "RGB")


def test_what_is_no_whole_picture_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"There is no picture `.*no.png`: give the path of a file\.$"):
        read_picture(tmp_path / "no.png")
    with pytest.raises(ValueError, match="There is no picture"):
        read_picture(tmp_path)  # a folder
    Image.new("RGB", (64, 64)).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"cut.png` is not a whole image \(.*\): replace it\.$"):
        read_picture(tmp_path / "cut.png")
