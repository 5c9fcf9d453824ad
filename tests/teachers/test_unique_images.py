"""The vision encoder runs on each picture of a batch once: the same features and gradients, of fewer pictures."""

import copy
import gc
import weakref

import pytest
import torch

from helpers.live_teacher_cases import examples
from llava_mod_hf.losses.rows import shift_for_next_token
from llava_mod_hf.teachers.live_teacher import LiveTeacher
from llava_mod_hf.teachers.unique_images import UniqueImages, different_rows, encode_once
from llava_mod_hf.teachers.vision_sharing import share_vision_tower


def pictures_encoded(model):
    seen = []
    model.base_model.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(args[0] if args else kwargs["pixel_values"])), with_kwargs=True
    )
    return seen


@pytest.fixture
def batch(collator):
    """Two questions about each of two pictures, and one about a third, in no order."""
    rows = examples(3)
    again = [{**rows[0], "prompt": rows[1]["prompt"]}, {**rows[1], "prompt": rows[0]["prompt"]}]
    batch = collator([rows[0], rows[1], again[1], rows[2], again[0]])
    return {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}


def step(model, batch):
    model.zero_grad()
    outputs = model.train()(**batch)
    outputs.loss.backward()
    return outputs.loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("layer", [-1, -2, [-2, -1]])
@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_loss_and_gradients_are_the_same(make_student, batch, layer, checkpointed):
    """Of every parameter, the encoder's among them, in float64."""
    model = make_student(moe_layers=[0])
    model.config.vision_feature_layer = layer
    model = type(model)(model.config).double()
    model.set_experts_implementation("eager")
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    seen = pictures_encoded(model)
    expected_loss, expected = step(model, batch)
    tower = model.model.vision_tower
    encode_once(model)
    encode_once(model)
    loss, gradients = step(model, batch)
    assert seen == [5, 3]
    assert model.model.vision_tower is tower
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
    assert gradients.keys() == expected.keys() and any("vision_tower" in name for name in gradients)
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-9, atol=1e-12 * largest)


def test_rows_differ_by_any_bit():
    rows = torch.randn(6, 3, 8, 8)
    rows[2], rows[5] = rows[0], rows[1]
    rows[4] = rows[0]
    rows[4, 2, 7, 7] = torch.nextafter(rows[4, 2, 7, 7], torch.tensor(9.0))
    rows[3] = rows[0].flip(-1)  # the same numbers elsewhere
    for dtype in (torch.float32, torch.float64):
        assert different_rows(rows.to(dtype)) == ([0, 1, 3, 4], [0, 1, 0, 2, 3, 1])
    assert different_rows(rows[:1]) == ([0], [0])
    assert different_rows(rows[:0]) == ([], [])
    whole = torch.arange(6, dtype=torch.bfloat16).remainder(3)[:, None]
    assert different_rows(whole) == ([0, 1, 2], [0, 1, 2, 0, 1, 2])


def test_rows_of_one_sum_are_compared(monkeypatch):
    monkeypatch.setattr(torch, "arange", lambda *args, **kwargs: torch.zeros(args[0], dtype=torch.int64) - 1)
    rows = torch.tensor([[1.0, 2.0], [2.0, 1.0], [1.0, 2.0]])  # equal sums without the places
    assert different_rows(rows) == ([0, 1], [0, 1, 0])


def test_a_teacher_that_shares_the_encoder_takes_the_features_of_the_same_pictures(make_student, processor, collator):
    student, teacher = make_student(seed=0), make_student(moe_layers=[], seed=1)
    teacher.model.vision_tower.load_state_dict(student.model.vision_tower.state_dict())
    student.model.vision_tower.requires_grad_(False)
    rows = examples(2)
    batch = dict(collator([rows[0], rows[1], dict(rows[0])]))
    labels = batch.pop("labels")
    keep, _ = shift_for_next_token(labels)
    expected = teacher.base_model(**batch).last_hidden_state[keep]
    live = LiveTeacher(share_vision_tower(student, teacher), student=student, processor=processor)
    own = LiveTeacher(copy.deepcopy(teacher), student=student, processor=processor)
    seen, seen_by_own = pictures_encoded(student), pictures_encoded(own.model)
    encode_once(student)
    for _ in range(2):
        student(**batch)
        torch.testing.assert_close(live.rows(batch, {}, labels).hidden, expected)
        torch.testing.assert_close(own.rows(batch, {}, labels).hidden, expected)
    assert seen == [2, 2], "the teacher took what the student had computed"
    assert seen_by_own == [2, 2]
    encode_once(teacher)  # whose hooks the copy has as well
    for model in (teacher, live.model):
        tower = model.base_model.vision_tower
        torch.testing.assert_close(model.base_model(**batch).last_hidden_state[keep], expected)
        assert model.base_model.vision_tower is tower


def test_dropout_is_drawn_for_each_picture(make_student, batch):
    model = make_student(moe_layers=[]).double()
    encode_once(model)
    model.model.vision_tower.config.attention_dropout = 0.1
    seen = pictures_encoded(model)
    step(model, batch)
    model.eval()(**batch)
    assert seen == [5, 3]


def test_the_encoder_is_back_after_an_error_and_by_itself_whole(make_student, batch):
    model = make_student(moe_layers=[]).double()
    encode_once(model)
    tower = model.model.vision_tower
    with pytest.raises(ValueError, match="(?i)image"):
        model(**{**batch, "input_ids": torch.full_like(batch["input_ids"], 5)})
    assert model.model.vision_tower is tower
    assert len(tower(batch["pixel_values"]).last_hidden_state) == 5
    assert not any(isinstance(module, UniqueImages) for module in model.modules())
    known = weakref.ref(model.base_model)
    del model, tower
    gc.collect()
    assert known() is None
