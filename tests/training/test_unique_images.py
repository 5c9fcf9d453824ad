"""Trainers whose student and teacher encode each picture of a batch once."""

import pytest
from datasets import concatenate_datasets

from helpers.ddp_gradients import assert_gradients_close, raw_gradients, rows
from helpers.trainers import ONE_FAST, TRAINERS
from llava_mod_hf.teachers.unique_images import UniqueImages

OPTIONS = {"adapt": {}, "mimic": {"share_vision_tower": False}, "prefer": {"share_prefix": False}}


@pytest.mark.parametrize("stage", ONE_FAST)
def test_the_same_gradients_of_fewer_pictures(models, processor, tmp_path, monkeypatch, stage):
    dataset = rows("preferences" if stage == "prefer" else "mixture", count=2)
    pictures = dataset["images"][:]
    other_way = dataset.map(lambda row, index: {"images": pictures[1 - index]}, with_indices=True)
    dataset = concatenate_datasets([dataset, other_way])  # two rows of each picture
    found, encoded = {}, {}
    for once in (True, False):
        if not once:
            monkeypatch.setattr(UniqueImages, "_begin", lambda *args: None)
        student, teacher = models()
        seen = encoded[once] = []
        for model in (student, teacher):
            model.model.vision_tower.embeddings.register_forward_pre_hook(
                lambda module, args, seen=seen: seen.append(len(args[0]))
            )
        trainer = TRAINERS[stage](student, teacher, processor, tmp_path / str(once), dataset=dataset, **OPTIONS[stage])
        found[once] = raw_gradients(trainer)
    assert_gradients_close(found[True], found[False])
    models_run, count = {"adapt": (1, 4), "mimic": (2, 4), "prefer": (2, 8)}[stage]
    assert (encoded[False], encoded[True]) == ([count] * models_run, [2] * models_run)
