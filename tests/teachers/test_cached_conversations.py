"""Conversations of a file, in one pass: by the stage, from a live teacher and from its cache."""

import pytest

from helpers.cached_teacher_cases import ALL, mimic_config, read
from helpers.load_cases import write
from helpers.templates import picture
from llava_mod_hf.commands import cache_teacher, mimic, stage_parts
from llava_mod_hf.commands.arguments import DistillArguments, UpcycleArguments
from llava_mod_hf.data.arguments import DataArguments

TURNS = (["what is it?", "a red square", "where is it?", "it is on the left of the picture", "sure?", "yes, it is"],)

TURNS += (["hello there?", "hi, how are you", "fine. who is it?", "it is only me"], ["what is there?", "a blue circle"])


@pytest.fixture
def file(tmp_path):
    picture().save(tmp_path / "a.png")
    rows = [
        {"conversations": [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]}
        for texts in TURNS
    ]
    for row in rows[::2]:
        row["image"] = "a.png"
        row["conversations"][0]["value"] += "\n<image>"
    return write(tmp_path / "rows.json", rows)


@pytest.fixture
def recipe(models, file, tmp_path):
    """`recipe(name, teacher, cache=None, **of the data)`: the mimic stage's options, all rows in one batch."""

    def make(name, teacher, cache=None, **values):
        args = mimic_config(
            tmp_path / name, per_device_train_batch_size=8, max_steps=2, lm_weight=0.5, learning_rate=1e-3
        )
        distill = DistillArguments(student=models["student"], teacher=models[teacher], teacher_cache=cache)
        return DataArguments(str(file), **values), distill, UpcycleArguments(), args

    return make


def losses(found):
    return pytest.approx([found["first_loss"], found["last_loss"]], rel=1e-5)


@pytest.mark.parametrize("teacher", ["teacher", "foreign"])
def test_one_pass_a_row_for_each_answer_and_a_cache_give_the_same_losses(recipe, teacher, tmp_path, monkeypatch):
    whole = mimic.run(*recipe("whole", teacher))
    each = mimic.run(*recipe("each", teacher, multi_turn="expand"))
    assert losses(whole) == [each["first_loss"], each["last_loss"]] and whole["first_loss"] != whole["last_loss"]
    folder = str(tmp_path / "cache")
    cache_teacher.run(*recipe("", teacher, folder), cache_teacher.CacheCommand(top_k=ALL, log_probs_dtype="float32"))
    written = read(tmp_path / "cache")
    assert len(written) == len(TURNS)
    if teacher == "foreign":  # the ends of turns differ, and have no numbers
        assert [flags.count(False) for flags in written["aligned"]] == [len(texts) // 2 for texts in TURNS]
    monkeypatch.setattr(stage_parts, "load_teacher", lambda *_: pytest.fail("the teacher was loaded"))
    cached = mimic.run(*recipe("cached", teacher, folder))
    assert losses(whole) == [cached["first_loss"], cached["last_loss"]]
    with pytest.raises(ValueError, match="lacks 5 of 6 rows that were looked for, first row 0, whose words"):
        mimic.run(*recipe("other", teacher, folder, multi_turn="expand"))
