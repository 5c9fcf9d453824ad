"""A student's distance from a teacher with a processor of its own, on the command line too."""

import json

import pytest
import torch

from helpers.ddp_gradients import rows, sharpened
from llava_mod_cli import main
from llava_mod_hf.data.conversations import AnswersCollator
from llava_mod_hf.evaluation.answers import kl_to_teacher
from llava_mod_hf.teachers.divergence import kl_to_live_teacher


def test_of_a_teacher_that_reads_the_same_tensors_it_is_the_same(student, make_student, processor):
    teacher = sharpened(make_student(moe_layers=[], seed=1))
    data = rows(count=5)
    for size in (2, 5):
        found = kl_to_live_teacher(student, processor, teacher, processor, data, batch_size=size)
        assert found == pytest.approx(kl_to_teacher(student, teacher, processor, data), rel=1e-5)


@pytest.mark.parametrize("padding", [0, 64])
def test_of_a_teacher_with_its_own_images_it_is_the_sum_over_the_same_words(student, make_teacher, processor, padding):
    size = len(processor.tokenizer)
    teacher, teacher_processor = make_teacher(vocab_size=size + padding)
    data = rows(count=3)
    total, count = 0.0, 0
    for row in data:  # one by one, in float64, the responses cut out of either's own text
        said = []
        for model, reader in ((student, processor), (teacher, teacher_processor)):
            batch = dict(AnswersCollator(reader, completion_only_loss=True)([dict(row)]))
            labels = batch.pop("labels")[0]
            with torch.no_grad():
                logits = model(**batch).logits[0, :, :size].double().log_softmax(-1)
            places = (labels != -100).nonzero()[:, 0]
            said.append((labels[places].tolist(), logits[places - 1]))
        (words, ours), (their_words, theirs) = said
        same = [word for word, other in zip(words, their_words, strict=False) if word == other]
        assert len(same) == len(words) - 1  # all but the end of the turn, which this template writes otherwise
        ours, theirs = ours[: len(same)], theirs[: len(same)]
        total += (theirs.exp() * (theirs - ours)).sum().item()
        count += len(same)
    found = kl_to_live_teacher(student, processor, teacher, teacher_processor, data, batch_size=2)
    assert found == pytest.approx(total / count, rel=1e-4)


def test_evaluate_measures_it(models, tmp_path):
    argv = ["--dataset_name", "embedded:easy-vqa", "--dataset_config", "questions", "--max_samples", "6"]
    argv += ["--teacher", models["foreign"], "--output_file", str(tmp_path / "results.json")]
    assert main(["evaluate", "--model", models["student"], *argv]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert 0 < results["student"]["kl_to_teacher"] < float("inf")
    assert results["teacher"]["exact_match"] is not None


def test_a_teacher_that_says_nothing_is_refused(student, make_teacher, processor):
    teacher, teacher_processor = make_teacher(before=" ")
    data = rows(count=4).filter(lambda row: " " not in row["answer"])  # of one word, which is another token there
    assert len(data)
    with pytest.raises(ValueError, match="speaks about no token"):
        kl_to_live_teacher(student, processor, teacher, teacher_processor, data)
