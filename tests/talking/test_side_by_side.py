"""Two models are asked one after the other, each answer comes in pieces, and then its figures."""

import re

import pytest

from llava_mod_hf.loading import load_model_and_processor
from llava_mod_hf.students.upcycling import upcycle
from llava_mod_hf.talking.answers import Answer
from llava_mod_hf.talking.conversation import Conversation
from llava_mod_hf.talking.sampling import Sampling
from llava_mod_hf.talking.side_by_side import Said, figures_of, side_by_side

SAMPLING = Sampling(max_new_tokens=6)
QUESTION = "describe the picture."


@pytest.fixture(scope="module")
def models(teacher):
    """One with experts in layers 0, 2, …, and one without; they answer differently."""
    model, processor = load_model_and_processor("embedded:scenes-teacher")
    return [(upcycle(model), processor), teacher]


def expected(model, processor, picture):
    conversation = Conversation(model, processor)
    if picture is not None:
        conversation.show(picture)
    answer = Answer(conversation, QUESTION, SAMPLING)
    assert "".join(answer) == answer.text != ""
    return answer


@pytest.mark.parametrize("shown", [True, False])
def test_each_model_answers_what_it_answers_alone(models, picture, shown):
    picture = picture if shown else None
    states = list(side_by_side(models, picture, f" {QUESTION}\n", SAMPLING))
    alone = [expected(*model, picture) for model in models]
    assert [said.text for said in states[-1]] == [answer.text for answer in alone]
    first = next(number for number, state in enumerate(states) if state[0].figures)
    assert states[first][0].text == alone[0].text and states[first][1] == Said()  # the second waits for the first
    pieces = [state[0].text for state in states[:first]]
    assert len(set(pieces)) > 1 and all(alone[0].text.startswith(piece) for piece in pieces)
    for said, answer in zip(states[-1], alone, strict=True):
        assert re.match(rf"{len(answer.tokens)} tokens in \d+\.\d\d s, ", said.figures)
        assert said.figures.endswith(f", cut at {len(answer.tokens)}") != answer.ended
    assert "layer 2" in states[-1][0].experts and states[-1][1].experts == ""


def test_figures_are_tokens_over_seconds(teacher):
    answer = Answer(Conversation(*teacher), "is there a circle?", Sampling())
    list(answer)
    answer.seconds = 0.5
    assert (
        figures_of(answer) == f"{len(answer.tokens)} tokens in 0.50 s, {len(answer.tokens) / 0.5:.1f} tokens per second"
    )


def test_without_a_question_nobody_is_asked(models):
    with pytest.raises(ValueError, match="There is no question"):
        next(side_by_side(models, None, " \n", SAMPLING))
