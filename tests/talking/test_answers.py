"""An answer as it comes is the one that `evaluate` gets, and each option of sampling changes it."""

import itertools
import threading

import pytest
import torch

from llava_mod_hf.data import easy_vqa, scene_rows
from llava_mod_hf.evaluation.answers import generate_answers
from llava_mod_hf.loading import load_model_and_processor
from llava_mod_hf.talking import answers
from llava_mod_hf.talking.answers import Answer
from llava_mod_hf.talking.conversation import Conversation
from llava_mod_hf.talking.sampling import Sampling


@pytest.fixture
def conversation(make_student, processor, picture):
    """Of a random student, whose answers are long and have no end."""
    conversation = Conversation(make_student(), processor)
    conversation.show(picture)
    return conversation


def said(conversation, **sampling):
    answer = Answer(conversation, "what is it?", Sampling(**{"max_new_tokens": 12, **sampling}))
    pieces = list(answer)
    assert "".join(pieces) == answer.text
    return answer


def test_answers_are_those_of_evaluate(teacher):
    rows = easy_vqa.load("questions", "test").select(range(6))
    expected = generate_answers(*teacher, rows)
    for row, text in zip(rows, expected, strict=True):
        conversation = Conversation(*teacher)
        conversation.show(row["images"][0])
        answer = Answer(conversation, row["question"], Sampling())
        assert "".join(answer) == answer.text == text
        assert answer.ended and answer.seconds > 0
        assert teacher[1].tokenizer.decode(answer.tokens[:-1]) == text


@pytest.fixture
def waits(monkeypatch):
    """A model that waits at its eighth token until the answer is left, or for a second."""

    def call(self, input_ids, scores, **kwargs):
        if next(tokens) == 8:
            self.event.wait(1)
        return stopped(self, input_ids, scores, **kwargs)

    tokens, stopped = itertools.count(1), answers._Stopped.__call__
    monkeypatch.setattr(answers._Stopped, "__call__", call)


@pytest.fixture(scope="module")
def description():
    """A question whose answer has many words: of the embedded scenes."""
    conversation = Conversation(*load_model_and_processor("embedded:scenes-teacher"))
    conversation.show(scene_rows.picture(3, "conversation", "test", 0))
    return conversation, "describe the picture.", Sampling()


def test_pieces_come_before_the_answer_is_done(description, waits):
    answer = Answer(*description)
    pieces = iter(answer)
    first = next(pieces)
    assert answer.text == "" and first == "a "
    assert first + "".join(pieces) == answer.text == "a red circle, a blue triangle and a red square"
    assert answer.ended and len(answer.tokens) > 8


def test_an_answer_that_is_left_ends_its_thread(description, waits):
    answer = Answer(*description)
    before, pieces = threading.active_count(), iter(answer)
    next(pieces)
    pieces.close()
    assert threading.active_count() == before
    assert 0 < len(answer.tokens) <= 8 and not answer.ended


def test_an_error_of_the_model_is_raised_where_the_answer_is_awaited(conversation, monkeypatch):
    def fails(**kwargs):
        raise RuntimeError("no memory")

    monkeypatch.setattr(conversation.model, "generate", fails)
    with pytest.raises(RuntimeError, match="no memory"):
        list(Answer(conversation, "what is it?", Sampling()))


def test_an_answer_ends_with_the_context(conversation):
    conversation.limit = conversation.read("what is it?")["input_ids"].shape[1] + 3
    assert len(said(conversation).tokens) == 3


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"max_new_tokens": 3}, {"max_new_tokens": 5}),
        ({"temperature": 0.1}, {"temperature": 100.0}),
        ({"temperature": 9.0}, {"temperature": 9.0, "seed": 1}),
        ({"temperature": 9.0}, {"temperature": 9.0, "top_k": 2}),
        ({"temperature": 9.0}, {"temperature": 9.0, "top_p": 0.05}),
        ({}, {"repetition_penalty": 5.0}),
    ],
)
def test_each_option_changes_the_answer_and_the_same_ones_repeat_it(conversation, one, other):
    state = torch.get_rng_state()
    assert said(conversation, **one).tokens == said(conversation, **one).tokens
    assert said(conversation, **one).tokens != said(conversation, **other).tokens
    assert torch.equal(torch.get_rng_state(), state)


def test_a_checkpoint_that_asks_for_sampling_is_not_asked(conversation):
    expected = said(conversation).tokens
    conversation.model.generation_config.do_sample = True
    conversation.model.generation_config.temperature = 50.0
    assert said(conversation).tokens == expected
