"""The vision tower of student and teacher runs once where both have the same."""

import copy

import pytest
import torch

from helpers.ddp_gradients import sharpened
from helpers.live_teacher_cases import examples
from llava_mod_hf.teachers.vision_sharing import SharedVisionTower, share_vision_tower


@pytest.fixture
def pair(make_student, processor):
    """A student with a frozen tower, and a teacher with the same one; how often towers ran."""

    def make(trained=False):
        student, teacher = sharpened(make_student(seed=0)), sharpened(make_student(moe_layers=[], seed=1))
        teacher.model.vision_tower.load_state_dict(student.model.vision_tower.state_dict())
        student.model.vision_tower.requires_grad_(trained)
        runs = []
        for name, model in (("student", student), ("teacher", teacher)):
            model.model.vision_tower.register_forward_hook(lambda *_, name=name: runs.append(name))
        return student, teacher, runs

    return make


def batches(collator, count=2):
    data = examples(8)
    found = [collator(data[4 * i : 4 * i + 4]) for i in range(count)]
    for batch in found:
        batch.pop("labels")
    return found


def test_the_tower_runs_once_per_step_with_identical_results(pair, processor, collator):
    student, teacher, runs = pair()
    expected = [teacher(**batch).logits for batch in batches(collator)]
    own = sum(p.numel() for p in teacher.model.vision_tower.parameters())
    total = teacher.num_parameters()
    runs.clear()
    teacher = share_vision_tower(student, teacher, processor, copy.deepcopy(processor))
    assert teacher.num_parameters() == total - own
    assert isinstance(teacher.model.vision_tower, SharedVisionTower)
    student.train()
    student.gradient_checkpointing_enable({"use_reentrant": False})
    for batch, logits in zip(batches(collator), expected, strict=True):  # accumulation: two micro-batches
        student(**batch).logits.sum().backward()
        assert teacher.model.vision_tower._seen[-1].pooler_output is None  # no hold on the student's graph
        with torch.inference_mode():
            found = teacher(**batch).logits
        assert torch.equal(found, logits)
    assert runs == ["student", "student"]
    student.eval()
    with torch.no_grad():  # evaluation
        student(**batch)
        assert torch.equal(teacher(**batch).logits, logits)
    assert runs == ["student"] * 3
    assert student.state_dict().keys() == pair()[0].state_dict().keys()


def test_the_callers_teacher_stays_whole(pair, collator, tmp_path):
    student, teacher, runs = pair()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    batch = batches(collator, 1)[0]
    expected = teacher(**batch).logits
    sharing = share_vision_tower(student, teacher)
    assert sharing.lm_head is teacher.lm_head
    assert sharing.model.language_model is teacher.model.language_model
    found = teacher.state_dict()
    assert found.keys() == before.keys()
    assert all(torch.equal(found[name], value) for name, value in before.items())
    runs.clear()
    assert torch.equal(teacher(**batch).logits, expected)
    assert runs == ["teacher"]
    teacher.save_pretrained(tmp_path)
    again = type(teacher).from_pretrained(tmp_path)
    assert torch.equal(again(**batch).logits, expected)


def test_shared_features_are_never_stale(pair, collator):
    student, teacher, runs = pair()
    first, second = batches(collator)
    expected = [teacher(**batch).logits for batch in (first, second)]
    teacher = share_vision_tower(student, teacher)
    runs.clear()
    student(**first)
    assert torch.equal(teacher(**second).logits, expected[1])  # other pixels
    assert torch.equal(teacher(**second).logits, expected[1])  # nothing remembered
    student(**first)
    changed = dict(first)
    changed["pixel_values"] = first["pixel_values"].copy_(second["pixel_values"])  # the same tensor, written over
    found = teacher(**changed).logits
    assert not torch.allclose(found, expected[0])
    assert runs == ["student"] * 5
    student(**second)
    again = {**second, "pixel_values": second["pixel_values"].clone()}  # equal pixels in another tensor
    assert torch.equal(teacher(**again).logits, expected[1])
    assert runs == ["student"] * 6


def test_a_teacher_of_lower_precision_takes_the_students_features(pair, collator):
    student, teacher, _ = pair()
    teacher = teacher.to(torch.bfloat16)
    batch = batches(collator, 1)[0]
    expected = teacher(**batch).logits
    teacher = share_vision_tower(student, teacher)
    student(**batch)
    found = teacher(**batch).logits
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05 * expected.abs().max().item())


@pytest.mark.parametrize("why", ["trained", "weights", "layer", "images", "config"])
def test_towers_that_differ_or_are_trained_are_not_shared(pair, processor, why):
    student, teacher, _ = pair(trained=why == "trained")
    other = copy.deepcopy(processor)
    if why == "weights":
        next(teacher.model.vision_tower.parameters()).data.view(-1)[0] += 1e-6
    elif why == "layer":
        teacher.config.vision_feature_layer = -2
    elif why == "images":
        other.image_processor.image_mean = [0.0, 0.0, 0.0]
    elif why == "config":
        teacher.model.vision_tower.config.layer_norm_eps = 1e-3
    assert share_vision_tower(student, teacher, processor, other) is teacher
    assert not isinstance(teacher.model.vision_tower, SharedVisionTower)


def test_a_shared_tower_that_is_trained_later_is_refused(pair, collator):
    student, teacher, _ = pair()
    teacher = share_vision_tower(student, teacher)
    student.model.vision_tower.requires_grad_(True)
    with pytest.raises(ValueError, match="freeze it"):
        teacher(**batches(collator, 1)[0])
