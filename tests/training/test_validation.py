"""Validation: what is held out, measured and chosen by, and that it changes nothing that is learnt."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from helpers.ddp_gradients import RUN, RawGradients, rows
from helpers.preference_trainers import preference_trainer
from helpers.stages import StopsAt
from helpers.trainers import ONE_FAST
from llava_mod_hf import MimicConfig, MimicTrainer, PreferenceConfig
from llava_mod_hf.data import easy_vqa
from llava_mod_hf.evaluation.answers import evaluate_model
from llava_mod_hf.evaluation.measures import MEASURES, Measure, VqaExactMatch, score
from llava_mod_hf.training.adapt_config import AdaptConfig
from llava_mod_hf.training.adapt_trainer import AdaptTrainer
from llava_mod_hf.training.validation import asked

CONFIGS = {"adapt": AdaptConfig, "mimic": MimicConfig, "prefer": PreferenceConfig}
SETTINGS = {"output_dir": "unused", "use_cpu": True, "bf16": False, "report_to": "none"}
EACH_STEP = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 2}
SAVED = {"save_strategy": "steps", "save_steps": 1}
OWN = ("peft_config", "callbacks", "eval_dataset")


def data_of(kind, count=8):
    return rows("preferences" if kind == "prefer" else "mixture", count)


@pytest.fixture
def trainer_of(models, processor, tmp_path):
    """`trainer_of(kind, moe_layers=(0, 2), **options)`: a trainer of eight rows, in `tmp_path / "run"`."""

    def make(kind, moe_layers=(0, 2), **args):
        student, teacher = models(moe_layers)
        student.name_or_path = "somewhere"
        args = {"train_modules": None, "learning_rate": 0.01, "batch": 2, **args}
        dataset = args.pop("dataset", None) or data_of(kind)
        own = {name: args.pop(name) for name in OWN if name in args}
        batch = args.pop("batch")
        if kind == "adapt":
            config = AdaptConfig(output_dir=str(tmp_path / "run"), per_device_train_batch_size=batch, **{**RUN, **args})
            return AdaptTrainer(student, config, train_dataset=dataset, processing_class=processor, **own)
        if kind == "mimic":
            config = MimicConfig(
                output_dir=str(tmp_path / "run"), per_device_train_batch_size=batch, **{**RUN, "lm_weight": 0.5, **args}
            )
            return MimicTrainer(student, teacher, config, train_dataset=dataset, processing_class=processor, **own)
        return preference_trainer(
            student, teacher, processor, tmp_path / "run", dataset=dataset, batch=batch, **args, **own
        )

    return make


def evaluations(trainer):
    return [logs for logs in trainer.state.log_history if "eval_loss" in logs]


# What is held out


@pytest.mark.parametrize("kind", ONE_FAST)
def test_a_trainer_holds_rows_out_and_is_evaluated_on_them(trainer_of, kind, caplog):
    trainer = trainer_of(kind, test_split_size=0.25, max_steps=2, **EACH_STEP)
    train, held = trainer.train_dataset, trainer.eval_dataset
    assert (len(train), len(held)) == (6, 2)
    assert "Held out 2 rows; 6 are trained on." in caplog.text
    words = [
        {str(row["prompt"]) + str(image.tobytes()) for row in side for image in row["images"]} for side in (train, held)
    ]
    assert len(words[0] | words[1]) == len(words[0]) + len(words[1])
    trainer.train()
    assert [logs["step"] for logs in evaluations(trainer)] == [1, 2]
    losses = [logs["eval_loss"] for logs in evaluations(trainer)]
    assert losses[0] != losses[1]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[1], rel=1e-6)
    assert ("eval_kl" in evaluations(trainer)[0]) == (kind == "mimic")
    other = trainer_of(kind, test_split_size=0.25, seed=3, **EACH_STEP)
    again = trainer_of(kind, test_split_size=2, **EACH_STEP)
    assert other.eval_dataset["prompt"] != held["prompt"] == again.eval_dataset["prompt"]


@pytest.mark.parametrize("kind", CONFIGS)
def test_without_rows_to_evaluate_on_it_is_refused(trainer_of, kind):
    with pytest.raises(ValueError, match="`eval_strategy` is `steps`, and there are no rows to evaluate on"):
        trainer_of(kind, **EACH_STEP)
    with pytest.raises(ValueError, match="`test_split_size` is 2, .* there are rows to evaluate on already"):
        trainer_of(kind, test_split_size=2, eval_dataset=data_of(kind), **EACH_STEP)


def test_an_evaluation_on_the_training_rows_is_told(trainer_of, caplog):
    data = data_of("mimic")
    trainer_of("mimic", dataset=data, eval_dataset={"own": data}, **EACH_STEP)
    assert "The rows that are evaluated on are those that are trained on." in caplog.text


# Answers


@pytest.mark.parametrize("kind", ONE_FAST)
def test_answers_are_measured_at_each_evaluation(trainer_of, processor, kind):
    trainer = trainer_of(kind, test_split_size=4, eval_answers=3, max_steps=2, **EACH_STEP)
    trainer.train()
    found = evaluations(trainer)
    assert len(found) == 2
    held = trainer.eval_dataset
    sample, has_kinds = asked(held, 3)
    assert has_kinds
    assert sample["question"] == [held["question"][number] for number in (0, 1, 2)]
    expected = evaluate_model(trainer.model, processor, sample.add_column("completion", sample["prompt"]))
    assert found[-1]["eval_exact_match"] == expected["exact_match"]
    by_kind = {f"eval_exact_match_by_kind/{name}": value for name, value in expected["exact_match_by_kind"].items()}
    assert by_kind.items() <= found[-1].items()
    assert by_kind


def test_hallucination_is_measured_where_it_applies(trainer_of, monkeypatch):
    data = easy_vqa.load("questions", "train").select(range(24))
    said = iter([["yes"] * 24, ["no"] * 24])
    monkeypatch.setattr("llava_mod_hf.training.validation.generate_answers", lambda *args, **kwargs: next(said))
    trainer = trainer_of(
        "mimic", dataset=data_of("mimic"), eval_dataset=data, eval_answers=24, max_steps=2, **EACH_STEP
    )
    trainer.train()
    claims, denials = evaluations(trainer)
    right = [sum(row["answer"] == answer for row in data) / 24 for answer in ("yes", "no")]
    assert [claims["eval_exact_match"], denials["eval_exact_match"]] == right
    expected = [score(predictions=[word] * 24, questions=data["question"][:], references=data["answer"][:],
                      kinds=data["kind"][:]) for word in ("yes", "no")]  # fmt: skip
    for figures, logs in zip(expected, (claims, denials), strict=True):
        assert logs["eval_hallucination_rate"] == figures["hallucination_rate"]
        assert logs["eval_miss_rate"] == figures["miss_rate"]
        assert not [name for name in logs if "chair" in name or "pope" in name]
    assert expected[0]["hallucination_rate"] != expected[1]["hallucination_rate"]


def test_rows_without_columns_of_their_own_are_asked_by_their_turns():
    data = rows().remove_columns(["question", "answer", "kind"])  # four rows
    sample, has_kinds = asked(data, 10)
    assert not has_kinds
    assert sample["question"] == rows()["question"][:]
    assert sample["answer"] == rows()["answer"][:]
    pairs, _ = asked(rows("preferences").remove_columns(["question", "answer", "kind"]), 2)
    chosen = rows("preferences")["chosen"]
    assert pairs["answer"] == [chosen[number][0]["content"] for number in (0, 2)]
    messages = data.map(
        lambda row: {"messages": row["prompt"] + row["completion"]}, remove_columns=["prompt", "completion"]
    )
    assert asked(messages, 10)[0]["answer"] == rows()["answer"][:]
    single = data.map(lambda row: {"image": row["images"][0]}, remove_columns=["images"])
    assert len(asked(single, 10)[0][0]["images"]) == 1
    turns = [{"role": "user", "content": "and?"}, {"role": "assistant", "content": "that"}]
    whole = data.map(lambda row: {"completion": [*row["completion"], *turns]})
    assert asked(whole, 10)[0]["answer"] == rows()["answer"][:]  # to the first question, which is what is asked
    stream = rows().to_iterable_dataset()
    assert asked(stream, 2)[0]["question"] == rows()["question"][:2]
    with pytest.raises(ValueError, match="`eval_answers` asks the prompts of conversations, and these rows have"):
        asked(data.map(lambda row: {"prompt": "what?"}), 2)


@pytest.mark.parametrize("kind", ONE_FAST)
def test_an_evaluation_does_not_change_what_is_learnt(trainer_of, kind):
    found = []
    for options in ({}, {**EACH_STEP, "eval_dataset": data_of(kind, 4), "eval_answers": 4}):
        callback = RawGradients()
        trainer = trainer_of(kind, max_steps=3, train_sampling_strategy="random", callbacks=[callback], **options)
        trainer.train()
        found.append(callback.steps)
    assert len(found[0]) == len(found[1]) == 3
    for before, after in zip(*found, strict=True):
        assert before.keys() == after.keys()
        assert all(torch.equal(value, after[name]) for name, value in before.items())


# Chosen by


class Spoils(TrainerCallback):
    """Makes the student worse with each step but the first, before it is evaluated."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step > 1:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data.mul_(-1.5)


@pytest.mark.parametrize("args", [{}, {"use_peft": True}], ids=["weights", "adapter"])
def test_the_best_model_is_loaded_at_the_end(trainer_of, tmp_path, args):
    options = {**EACH_STEP, **SAVED, "load_best_model_at_end": True, "metric_for_best_model": "kl", "max_steps": 3}
    trainer = trainer_of("mimic", test_split_size=2, callbacks=[Spoils()], **options, **args)
    trainer.train()
    divergences = [logs["eval_kl"] for logs in evaluations(trainer)]
    assert min(divergences) == divergences[0]
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    trainer.save_model(tmp_path / "end")
    name = "adapter_model.safetensors" if args else "model.safetensors"
    files = [load_file(tmp_path / folder / name) for folder in ("end", "run/checkpoint-1", "run/checkpoint-3")]
    assert all(torch.equal(value, files[1][key]) for key, value in files[0].items())
    for part in ("experts", "gate", "multi_modal_projector"):
        assert any(not torch.equal(value, files[2][key]) for key, value in files[0].items() if part in key), part


@pytest.mark.parametrize(
    ("metric", "args", "greater"),
    [
        ("kl", {}, False),
        ("eval_kl", {}, False),
        ("kl_teacher_1", {}, False),
        ("margins/below", {}, False),
        ("loss", {}, False),
        ("mean_token_accuracy", {}, True),
        ("exact_match", {"eval_answers": 2}, True),
        ("hallucination_rate", {"eval_answers": 2}, False),
        ("eval_chair_i", {"eval_answers": 2}, False),
        ("object_recall", {"eval_answers": 2}, True),
        ("pope/presence (random)/f1", {"eval_answers": 2}, True),
        ("kl", {"greater_is_better": True}, True),
    ],
)
@pytest.mark.parametrize("kind", CONFIGS)
def test_whether_a_figure_is_better_when_it_is_higher(kind, metric, args, greater):
    config = CONFIGS[kind](**SETTINGS, **EACH_STEP, metric_for_best_model=metric, **args)
    assert config.greater_is_better is greater


def test_a_measure_that_is_added_says_itself_whether_lower_is_better(monkeypatch):
    added = Measure(VqaExactMatch, ("predictions",), ("wrong", "right"), lower_is_better=("wrong",))
    monkeypatch.setitem(MEASURES, "added", added)
    found = [
        MimicConfig(**SETTINGS, **EACH_STEP, eval_answers=1, metric_for_best_model=name).greater_is_better
        for name in ("wrong", "right")
    ]
    assert found == [False, True]


def test_a_run_ends_when_nothing_gets_better(trainer_of):
    options = {**EACH_STEP, "metric_for_best_model": "kl", "max_steps": 6, "test_split_size": 2}
    for patience in (1, 2):
        trainer = trainer_of("mimic", early_stopping_patience=patience, callbacks=[Spoils()], **options)
        trainer.train()
        assert trainer.state.global_step == 1 + patience
    own = {**options, "test_split_size": None, "lm_weight": 0.0, "learning_rate": 1e-3, "batch": 8}
    better = trainer_of("mimic", early_stopping_patience=1, eval_dataset=data_of("mimic"), **own)
    better.train()
    divergences = [logs["eval_kl"] for logs in evaluations(better)]
    assert divergences == sorted(divergences, reverse=True)
    assert better.state.global_step == 6
    always = trainer_of(
        "mimic", early_stopping_patience=1, early_stopping_threshold=1e9, eval_dataset=data_of("mimic"), **own
    )
    always.train()
    assert always.state.global_step == 2  # nothing is better by so much


def test_an_early_stop_counts_over_a_resumption(trainer_of):
    options = {**EACH_STEP, **SAVED, "metric_for_best_model": "kl", "max_steps": 6, "test_split_size": 2}
    options |= {"early_stopping_patience": 2, "early_stopping_threshold": 1e9}
    with pytest.raises(InterruptedError):
        trainer_of("mimic", callbacks=[StopsAt(3)], **options).train()
    trainer = trainer_of("mimic", **options)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 3  # the first evaluation is the best, two more are not better
    assert len(evaluations(trainer)) == 3


# What is refused


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"test_split_size": 0.1}, "`test_split_size` is 0.1, which does nothing without `eval_strategy`"),
        ({"eval_answers": 4}, "`eval_answers` is 4, which does nothing without `eval_strategy`"),
        ({"early_stopping_patience": 4}, "`early_stopping_patience` is 4, which does nothing without `eval_strategy`"),
        *(
            ({"test_split_size": size, **EACH_STEP}, f"`test_split_size` is {size}: give a share between 0 and 1")
            for size in (0, -0.5, 1.5)
        ),
        ({"eval_answers": -1, **EACH_STEP}, "`eval_answers` is -1: give a number"),
        (
            {"early_stopping_patience": 0, "metric_for_best_model": "loss", **EACH_STEP},
            "`early_stopping_patience` is 0",
        ),
        ({"early_stopping_patience": 1, **EACH_STEP}, "nothing says which figure has to get better"),
        (
            {"early_stopping_threshold": 0.5, **EACH_STEP},
            "`early_stopping_threshold` is 0.5, which does nothing without",
        ),
        ({"metric_for_best_model": "exact_match", **EACH_STEP}, "a measure of answers, and `eval_answers` is 0"),
        ({"metric_for_best_model": "eval_pope/x/f1", **EACH_STEP}, "a measure of answers, and `eval_answers` is 0"),
        ({"eval_answers": 0.5, **EACH_STEP}, "`eval_answers` is 0.5: give a value of int"),
    ],
)
def test_what_does_nothing_is_refused(kind, args, message):
    with pytest.raises(ValueError, match=message):
        CONFIGS[kind](**SETTINGS, **args)


def test_a_figure_that_there_is_not_is_refused_in_a_sentence(trainer_of):
    trainer = trainer_of("mimic", test_split_size=2, metric_for_best_model="bleu", **EACH_STEP)
    with pytest.raises(
        ValueError, match="`metric_for_best_model` is `bleu`, and an evaluation gives eval_loss, .*eval_kl"
    ):
        trainer.train()
