"""Trainers whose batches hold as many rows as a number of tokens allows."""

import itertools

import pytest
from datasets import concatenate_datasets
from transformers import TrainerCallback

from helpers.ddp_gradients import (
    assert_gradients_close,
    gradients_of_two_processes,
    half_text_rows,
    raw_gradients,
    rows,
)
from helpers.trainers import TRAINERS
from llava_mod_hf import MimicConfig
from llava_mod_hf.data.fitting import LENGTH, fit_rows
from llava_mod_hf.training.adapt_config import AdaptConfig

BUDGET = {"train_sampling_strategy": "group_by_length", "max_tokens_per_batch": 80, "batch": 8}

CONFIGS = {"adapt": AdaptConfig, "mimic": MimicConfig}


@pytest.fixture(scope="module")
def dataset(processor):
    """Eight rows, two without a picture, of several lengths."""
    return fit_rows(
        concatenate_datasets([rows(count=8).select(range(4, 8)), half_text_rows()]), processor, max_length=None
    )[0]


@pytest.mark.parametrize("stage", [pytest.param("adapt", marks=pytest.mark.slow), "mimic"])
def test_the_gradients_are_those_of_the_rows_one_by_one(models, processor, dataset, tmp_path, stage):
    seen, found = [], []
    for options in ({**BUDGET, "max_tokens_per_batch": 100, "accumulation": 3}, {"batch": 1, "accumulation": 8}):
        student, teacher = models()
        options = {"router_aux_loss_coef": 0.0, **options}
        trainer = TRAINERS[stage](student, teacher, processor, tmp_path, dataset=dataset, **options)
        loader = trainer.get_train_dataloader()
        seen.append([len(batch["labels"]) for batch in loader])
        assert len(loader) == options["accumulation"], "one step has all of the rows"
        found.append(raw_gradients(trainer))
        assert trainer.state.log_history[0]["loss"] > 0
    assert (sorted(seen[0]), seen[1]) == ([2, 3, 3], [1] * 8)
    assert_gradients_close(found[0], found[1])


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one(models, processor, tmp_path):
    student, teacher = models()
    for name, model in (("student", student), ("teacher", teacher)):
        model.save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
    found = gradients_of_two_processes(tmp_path, modes=["tokens"])
    options = {"batch": 1, "accumulation": 8, "router_aux_loss_coef": 0.0}
    trainer = TRAINERS["mimic"](student, teacher, processor, tmp_path, dataset=rows(count=8), **options)
    assert_gradients_close(found["tokens"], raw_gradients(trainer))
    assert found["log tokens"]["loss"] == pytest.approx(trainer.state.log_history[0]["loss"], rel=1e-5)


class StopsAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def test_a_run_goes_on_where_it_stopped(models, processor, dataset, tmp_path):
    def make(stop=None):
        student, _ = models([])
        options = {**BUDGET, "max_steps": -1, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 3}
        callbacks = [StopsAt(stop)] if stop else []
        trainer = TRAINERS["adapt"](
            student, None, processor, tmp_path, dataset=dataset, accumulation=2, callbacks=callbacks, **options
        )
        seen, collate = [], trainer.data_collator
        trainer.data_collator = lambda examples: (
            seen.append([example["prompt"][0]["content"] for example in examples]) or collate(examples)
        )
        return trainer, seen

    trainer, seen = make()
    trainer.train()
    assert trainer.state.global_step == 4 and len(seen) == 8
    texts = sorted(row["prompt"][0]["content"] for row in dataset)
    assert all(sorted(itertools.chain(*epoch)) == texts for epoch in (seen[:4], seen[4:]))
    cut, before = make(stop=3)
    cut.train()
    resumed, after = make()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert before[:6] + after[-2:] == seen


@pytest.mark.parametrize("stage", ["adapt", "mimic"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens_per_batch": 0}, "`max_tokens_per_batch` is 0: give at least 1"),
        (
            {"per_device_train_batch_size": 4},
            "`per_device_train_batch_size` is 4, which does nothing .*8 is the default",
        ),
        ({"dataloader_drop_last": True}, "`dataloader_drop_last` is True, which does nothing with"),
        ({"auto_find_batch_size": True}, "`auto_find_batch_size` is True, which does nothing with"),
        ({"train_sampling_strategy": "random"}, "`max_tokens_per_batch` is 80, which does nothing without"),
    ],
)
def test_what_does_not_go_together_is_refused(stage, options, message):
    given = {name: value for name, value in BUDGET.items() if name != "batch"}
    with pytest.raises(ValueError, match=message):
        CONFIGS[stage]("out", use_cpu=True, bf16=False, **{**given, **options})


def test_a_stream_and_a_row_that_is_too_long_are_refused(models, processor, dataset, tmp_path):
    student, _ = models([])
    with pytest.raises(ValueError, match="`max_tokens_per_batch` is 80, and the rows are a stream"):
        TRAINERS["adapt"](student, None, processor, tmp_path, dataset=dataset.to_iterable_dataset(), **BUDGET)
    options = {**BUDGET, "max_tokens_per_batch": max(dataset[LENGTH]) - 1}
    trainer = TRAINERS["adapt"](student, None, processor, tmp_path, dataset=dataset, **options)
    with pytest.raises(ValueError, match="A row has .* tokens, and `max_tokens_per_batch` is"):
        trainer.train()
