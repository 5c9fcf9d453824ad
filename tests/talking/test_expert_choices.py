"""Which experts each token went to: what a forward pass over the same tokens chooses, and the table of it."""

import re

import pytest
import torch

from llava_mod_hf.talking.answers import Answer
from llava_mod_hf.talking.conversation import Conversation
from llava_mod_hf.talking.expert_choices import TokenExperts, experts_page, shares, token_experts, watching_routers
from llava_mod_hf.talking.sampling import Sampling


@pytest.fixture
def answer(make_student, processor, picture):
    """Of a random student with experts in layers 0 and 2, through."""
    conversation = Conversation(make_student(), processor)
    conversation.show(picture)
    answer = Answer(conversation, "what is it?", Sampling(max_new_tokens=5), watch_experts=True)
    assert "".join(answer) == answer.text
    return answer


def test_choices_are_those_of_a_forward_pass(answer):
    tokens = torch.tensor([answer.prompt + answer.tokens[:-1]])
    pixels = answer._inputs["pixel_values"]
    with torch.no_grad():
        outputs = answer.model(input_ids=tokens, pixel_values=pixels, output_router_logits=True)
    assert list(answer.experts) == [0, 2]
    for chosen, logits in zip(answer.experts.values(), outputs.router_logits, strict=True):
        assert torch.equal(chosen, logits.topk(2, dim=-1).indices)


def count_hooks(model):
    return sum(len(module._forward_hooks) for module in model.modules())


def test_nothing_is_noted_unasked_nor_afterwards(answer, make_student, processor):
    conversation = Conversation(answer.model, processor)
    hooks = count_hooks(answer.model)  # after a first answer: transformers leaves some of its own
    again = Answer(conversation, "what is it?", Sampling(max_new_tokens=3), watch_experts=True)
    assert "".join(again) == again.text and again.experts
    assert count_hooks(answer.model) == hooks
    unwatched = Answer(conversation, "what is it?", Sampling(max_new_tokens=3))
    assert "".join(unwatched) == unwatched.text and unwatched.tokens and unwatched.experts == {}
    assert len(answer.experts[0]) == len(answer.prompt) + 4
    with watching_routers(make_student(moe_layers=[])) as found:
        pass
    assert found == {}


def test_each_token_has_its_part(answer, processor):
    rows = token_experts(answer)
    assert [row.part for row in rows].count("picture") == 16
    assert "".join(row.text for row in rows if row.part == "question") == "<|user|>what is it?<|assistant|>"
    assert [row.text for row in rows if row.part == "answer"] == [processor.decode([t]) for t in answer.tokens[:-1]]
    assert rows[-1].experts == tuple(tuple(choices[-1].tolist()) for choices in answer.experts.values())


def test_shares_are_of_the_choices():
    rows = [TokenExperts("question", "a", ((0, 1),)), TokenExperts("question", "b", ((1, 2),))]
    rows.append(TokenExperts("answer", "c", ((3, 0),)))
    assert shares(rows, 4) == {"question": [[0.25, 0.5, 0.25, 0.0]], "answer": [[0.5, 0.0, 0.0, 0.5]]}


def test_the_page_has_a_cell_for_each_layer_and_token(answer):
    page = experts_page(answer)
    rows = [row for row in token_experts(answer) if row.part != "picture"]
    for place, layer in enumerate((0, 2)):
        (line,) = re.findall(rf'<tr><th scope="row">layer {layer}</th>(.*)</tr>', page)
        cells = re.findall(r'<td class="(\w+)"[^>]*>([^<]*)</td>', line)
        assert cells == [(row.part, ", ".join(map(str, row.experts[place]))) for row in rows]
    assert "&lt;|user|&gt;" in page and "<|user|>" not in page  # a token is a text, whatever it holds
    assert len(re.findall(r'<th scope="row">picture, layer', page)) == 2


def test_a_dense_model_has_no_page(make_student, processor):
    answer = Answer(
        Conversation(make_student(moe_layers=[]), processor), "what?", Sampling(max_new_tokens=3), watch_experts=True
    )
    assert "".join(answer) == answer.text and answer.tokens and experts_page(answer) == ""
