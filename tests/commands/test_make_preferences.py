"""`llava-mod make-preferences`: the best and the worst of several answers, by each scorer, made the same again."""

import json

import pytest
import torch
import yaml
from datasets import Dataset

from helpers.ddp_gradients import RUN
from helpers.models import extend, prompt_inputs, sharpen
from llava_mod_cli import main
from llava_mod_hf.commands import make_preferences
from llava_mod_hf.commands.make_preferences import PairArguments, answer_log_probs, best_and_worst, right_answers
from llava_mod_hf.commands.make_preferences import run as run_make_preferences
from llava_mod_hf.data import easy_vqa
from llava_mod_hf.data.arguments import DataArguments, PromptArguments
from llava_mod_hf.data.load import load_rows
from llava_mod_hf.evaluation.answers import sample_answers

ROWS = 5
COLUMNS = ("prompt", "chosen", "rejected")


def longest(row, answers):
    """A user's scorer: the longest answer is the best, and rows about circles have none."""
    return [0.0 if "circle" in row["question"] else len(answer) for answer in answers]


def too_few(row, answers):
    return [1.0]


@pytest.fixture(scope="module")
def folders(make_student, processor, tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for name, seed in (("student", 0), ("teacher", 1)):
        sharpen(make_student(moe_layers=[], seed=seed)).save_pretrained(root / name)
        processor.save_pretrained(root / name)
    return {name: str(root / name) for name in ("student", "teacher")}


@pytest.fixture(scope="module")
def rows():
    return easy_vqa.load("questions", "train", 0).select(range(ROWS))


def make(folders, output, rows=ROWS, **values):
    values = {"scorer": f"{__name__}:longest", "num_answers": 3, "max_new_tokens": 3, "shard_size": 2, **values}
    args = PairArguments(model=folders["student"], output_dir=str(output), keep_unfinished=True, batch_size=4, **values)
    return run_make_preferences(PromptArguments(easy_vqa.DATASET, "questions", max_samples=rows), args)


def written(output):
    return load_rows(DataArguments(str(output)), columns=COLUMNS)


def content(messages):
    [message] = messages
    assert message["role"] == "assistant"
    return message["content"]


def test_log_probabilities_equal_a_float64_loop_over_single_rows(make_student, processor, rows):
    model = sharpen(make_student(moe_layers=[]))
    examples = []
    for i, row in enumerate(rows):
        images = row["images"] if i % 2 else []
        examples.append({"images": images, "prompt": row["prompt"], "completion": row["completion"]})
    expected = {"sum": [], "mean": []}
    for example, row in zip(examples, rows, strict=True):
        prompt = prompt_inputs(processor, {**row, "images": example["images"]})
        answer = processor.tokenizer(row["answer"] + "<|end|>")["input_ids"]
        with torch.no_grad():
            logits = model(**extend(prompt, answer)).logits[0, prompt["input_ids"].shape[1] - 1 : -1].double()
        terms = logits.log_softmax(-1)[range(len(answer)), answer]
        expected["sum"].append(terms.sum().item())
        expected["mean"].append(terms.mean().item())
    assert expected["sum"] != expected["mean"]
    for reduction, values in expected.items():
        found = answer_log_probs(model, processor, examples, batch_size=3, reduction=reduction)
        assert found == pytest.approx(values, rel=1e-4)


@pytest.mark.parametrize("column", ["prompt", "completion"])
def test_an_example_that_spells_out_a_mark_is_refused(processor, rows, column):
    examples = [{name: row[name] for name in ("images", "prompt", "completion")} for row in rows]
    examples[3][column] = [{"role": "user" if column == "prompt" else "assistant", "content": "a <image> b"}]
    with pytest.raises(ValueError, match="Example 3: a text holds `<image>`"):
        answer_log_probs(None, processor, examples, batch_size=3)


def test_answers_that_spell_out_a_mark_make_no_pair(folders, tmp_path, monkeypatch):
    said = [("<|user|> red", True), ("an <image>", True), ("a", True), ("abc", True)]
    monkeypatch.setattr(make_preferences, "sample_answers", lambda *a, **k: [said] * len(a[2]))
    monkeypatch.setattr(f"{__name__}.longest", lambda row, answers: [len(answer) for answer in answers])
    make(folders, tmp_path / "set")
    for row in written(tmp_path / "set"):
        assert (content(row["chosen"]), content(row["rejected"])) == ("abc", "a")


def test_best_and_worst():
    assert best_and_worst(["a", "b", "c", "d"], [1.0, 3.0, 3.0, 0.0]) == (1, 3)
    assert best_and_worst(["a", "b"], [0.5, 0.5]) is None
    assert best_and_worst(["a"], [0.5]) is None
    assert best_and_worst([], []) is None


def test_a_users_scorer_orders_the_answers_and_ties_are_dropped_and_counted(folders, tmp_path, rows, caplog):
    counts = make(folders, tmp_path / "set")
    dataset = written(tmp_path / "set")
    asked = [row["question"] for row in rows if "circle" not in row["question"]]
    assert 0 < len(asked) < ROWS
    assert set(dataset["question"]) <= set(asked)
    for row in dataset:
        chosen, rejected = content(row["chosen"]), content(row["rejected"])
        assert len(chosen) == row["chosen_score"] > row["rejected_score"] == len(rejected)
    assert counts == {"prompts": ROWS, "rows": len(dataset)}
    assert f"{ROWS - len(dataset)} of {ROWS} prompts led to no two answers of different score" in caplog.text
    assert dataset[0]["images"][0].size == (64, 64)


class Stops(Exception):
    pass


def test_a_run_that_was_cut_off_goes_on_to_the_same_end_and_another_seed_to_another(folders, tmp_path, monkeypatch):
    make(folders, tmp_path / "whole")
    calls = []

    def sample_once(*args, **kwargs):
        calls.append(kwargs["seed"])
        if len(calls) == 2:
            raise Stops
        return sample_answers(*args, **kwargs)

    monkeypatch.setattr(make_preferences, "sample_answers", sample_once)
    with pytest.raises(Stops):
        make(folders, tmp_path / "cut")
    make(folders, tmp_path / "cut")
    assert len(calls) == 4  # the first of three shards is not made again
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("whole", "cut")]
    assert files[0] == files[1] and len(files[0]) == 7
    with pytest.raises(ValueError, match="was begun with `seed`"):
        make(folders, tmp_path / "cut", seed=1)
    make(folders, tmp_path / "other", seed=1)
    assert written(tmp_path / "other")["chosen"][:] != written(tmp_path / "cut")["chosen"][:]


def test_the_teachers_likelihood_and_training_on_what_was_written(folders, tmp_path, capsys):
    recipe = {
        "model": folders["student"],
        "teacher": folders["teacher"],
        "dataset_name": easy_vqa.DATASET,
        "dataset_config": "questions",
        "max_samples": 3,
        "output_dir": str(tmp_path / "pairs"),
        "num_answers": 3,
        "max_new_tokens": 3,
        "keep_unfinished": True,
    }
    (tmp_path / "make.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["make-preferences", "--config", str(tmp_path / "make.yaml")]) == 0, capsys.readouterr().err
    dataset = written(tmp_path / "pairs")
    assert len(dataset) == 3
    args = PairArguments(model=folders["student"], output_dir="", teacher=folders["teacher"])
    model, processor = args.load(folders["teacher"])
    for name in ("chosen", "rejected"):
        examples = [{"images": r["images"], "prompt": r["prompt"], "completion": r[name]} for r in dataset]
        found = answer_log_probs(model, processor, examples, batch_size=3)
        assert dataset[f"{name}_score"][:] == pytest.approx(found, rel=1e-4)
    assert all(row["chosen_score"] > row["rejected_score"] for row in dataset)
    with pytest.raises(ValueError, match="was begun with `likelihood`"):
        run_make_preferences(
            PromptArguments(easy_vqa.DATASET, "questions", max_samples=3),
            PairArguments(
                **{k: v for k, v in recipe.items() if "set" not in k and k != "max_samples"}, likelihood="sum"
            ),
        )

    recipe = {**RUN, "student": folders["student"], "teacher": folders["teacher"], "max_steps": 1}
    recipe |= {"dataset_name": str(tmp_path / "pairs"), "output_dir": str(tmp_path / "run")}
    recipe |= {"per_device_train_batch_size": 2, "train_sampling_strategy": "group_by_length"}
    (tmp_path / "prefer.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["prefer", "--config", str(tmp_path / "prefer.yaml")]) == 0, capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "run.json").read_text())["steps"] == 1


def test_ground_truth(folders, tmp_path, rows, monkeypatch):
    def sample(model, processor, dataset, **kwargs):
        return [[(f" {row['answer'].upper()}. ", True), ("wrong", True), ("wrong", True)] for row in dataset]

    monkeypatch.setattr(make_preferences, "sample_answers", sample)
    make(folders, tmp_path / "set", scorer="answer")
    dataset = written(tmp_path / "set")
    assert [content(messages) for messages in dataset["chosen"]] == [f"{row['answer'].upper()}." for row in rows]
    assert {content(messages) for messages in dataset["rejected"]} == {"wrong"}
    monkeypatch.setattr(
        make_preferences, "sample_answers", lambda *a, **k: [[("wrong", True), ("worse", True)]] * len(a[2])
    )
    with pytest.raises(ValueError, match=f"None of the {ROWS} prompts led to a row"):
        make(folders, tmp_path / "none", scorer="answer")


PARTS = [{"role": "assistant", "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "dog"}]}]
SAID = [{"role": "assistant", "content": None}]


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"answer": ["red", None]}, "Row 1: the `answer` is None: `scorer: answer` compares with a text"),
        ({"answer": [["red"], ["blue"]]}, r"Row 0: the `answer` is \['red'\]: `scorer: answer` compares with a text"),
        ({"answer": [3, 4]}, "Row 0: the `answer` is 3"),
        ({"answer": ["red", " "], "source_row": [4, 9]}, "Row 9: the `answer` is ' '"),
        ({"completion": [PARTS, None]}, "Row 1: the `completion` is None"),
        ({"completion": [SAID]}, "Row 0: an answer is empty"),
        ({"completion": [[{"role": "assistant", "content": ["a", "dog"]}]]}, r"Row 0: an answer is .*: give a text"),
        ({"question": ["what?"]}, "have neither an `answer` nor a `completion`"),
    ],
)
def test_what_answers_cannot_be_compared_with_is_named(columns, told):
    with pytest.raises(ValueError, match=told):
        right_answers(Dataset.from_dict(columns))


def test_a_right_answer_may_be_a_text_or_parts_of_one():
    assert right_answers(Dataset.from_dict({"completion": [PARTS]})) == ["a dog"]
    assert right_answers(Dataset.from_dict({"completion": ["a dog"]})) == ["a dog"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": 0.0}, "`temperature` is 0.0 and `num_answers` 3: a pair needs two different answers"),
        ({"num_answers": 1}, "`num_answers` 1"),
        ({"scorer": "teacher"}, "there is no `teacher`: name the model that scores"),
        ({"scorer": "length"}, "`scorer` is 'length': give teacher, answer or `module:function`"),
        ({"likelihood": "max"}, "`likelihood` is 'max'"),
        ({"scorer": "nowhere:score"}, "`scorer` is `nowhere:score`, which cannot be imported"),
        ({"scorer": f"{__name__}:nothing"}, "which cannot be imported"),
        ({"scorer": f"{__name__}:too_few"}, "returned 1 scores for the 3 answers to row 0"),
    ],
)
def test_bad_options_are_refused(folders, tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        make(folders, tmp_path / "set", **values)
