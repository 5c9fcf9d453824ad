"""`llava-mod evaluate --measures`: answers kept and taken up again, batches, differences, and rows of benchmarks."""

import json
import shutil

import pytest
import yaml
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as Pictures

from llava_mod_cli import main
from llava_mod_hf.data.scene_rows import load
from llava_mod_hf.evaluation import answer_file
from llava_mod_hf.evaluation.metrics.exact_match import ExactMatch
from llava_mod_hf.publishing.checks import files_to_commit

ROWS = 24

STUDENT, TEACHER = "embedded:scenes-teacher", "embedded:scenes-clean-teacher"  # who know something of the scenes

SCENES = ["--dataset_name", "embedded:scenes", "--dataset_config", "mixture", "--blind", "false"]


def evaluate(model, output_file, *more, options=SCENES):
    if options is SCENES:
        more = ("--dataset_options", json.dumps({"rows": ROWS}), *more)
    assert main(["evaluate", "--model", model, *options, "--output_file", str(output_file), *more]) == 0
    return json.loads(output_file.read_text())


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def asked(monkeypatch):
    """How many rows were asked, of each call."""
    counts, generate = [], answer_file.generate_answers

    def noted(model, processor, dataset, **options):
        counts.append(len(dataset))
        return generate(model, processor, dataset, **options)

    monkeypatch.setattr(answer_file, "generate_answers", noted)
    return counts


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """Results of the student and of the teacher."""
    folder = tmp_path_factory.mktemp("results")
    measures = ("--measures", "exact_match", "chair", "--max_new_tokens", "12")
    results = evaluate(STUDENT, folder / "results.json", *measures, "--teacher", TEACHER)
    return folder / "results.json", results


def test_every_answer_is_kept_beside_the_results(first):
    path, results = first
    scenes = load("mixture", "test", 0, {"rows": ROWS})
    for role, who in (("", "student"), ("teacher_", "teacher")):
        head, *answers = lines(path.with_name(f"results.{role}answers.jsonl"))
        assert {"model", "tokenizer", "chat template", "max_new_tokens", "torch"} < set(head["identity"])
        for name in ("question", "answer", "kind"):
            assert [each[name] for each in answers] == list(scenes[name])
        found = ExactMatch(keep_in_memory=True).compute(
            predictions=[each["given"] for each in answers], references=[[each["answer"]] for each in answers]
        )
        figure = results[who]["measures"]["exact_match"]["exact_match"]
        assert figure["value"] == found["exact_match"] == results[who]["exact_match"]
        assert figure["low"] <= figure["value"] <= figure["high"]
        assert set(results[who]["measures"]["chair"]) == {"chair_s", "chair_i", "object_recall"}
    assert 0 < results["student"]["measures"]["exact_match"]["exact_match"]["value"] < 1
    assert results["blind"] is None and "against" not in results
    assert [file.name for file in files_to_commit(path.parent)] == ["results.json"]  # answers hold words of rows


def test_the_results_say_how_they_were_made(first, processor):
    setup = first[1]["setup"]
    question = load("mixture", "test", 0, {"rows": 1})[0]["question"]
    assert question in setup["first_prompt"] and setup["first_prompt"].count("<image>") == 1
    assert setup["max_new_tokens"] == 12 and setup["dataset_options"] == {"rows": ROWS}
    assert {"torch", "transformers", "evaluate", "llava-mod-hf"} <= set(setup["versions"])
    assert setup["commit"] is None or len(setup["commit"].removesuffix("-dirty")) == 40


@pytest.mark.parametrize("torn", ["", '{"key": "12' + "x" * 9000, '{"key": "k", "given": "x"}', "null\n"], ids=len)
def test_a_killed_run_asks_only_what_is_missing(tmp_path, first, asked, torn):
    path, results = first
    kept = path.with_name("results.answers.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "results.answers.jsonl").write_text("".join(kept[:5]) + torn)
    again = evaluate(STUDENT, tmp_path / "results.json", "--measures", "exact_match", "chair", "--max_new_tokens", "12")
    assert asked == [ROWS - 4]
    assert again["student"]["measures"] == results["student"]["measures"]
    assert sorted((tmp_path / "results.answers.jsonl").read_text().splitlines(keepends=True)) == sorted(kept)
    evaluate(STUDENT, tmp_path / "results.json", "--max_new_tokens", "12")
    assert len(asked) == 1


def test_an_answer_is_on_disk_before_the_next_batch(tmp_path, monkeypatch):
    generate, written = answer_file.generate_answers, []

    def killed(*args, keep, **options):
        def counted(answers):
            keep(answers)
            written.append(len(lines(tmp_path / "results.answers.jsonl")) - 1)
            if len(written) == 2:
                raise KeyboardInterrupt

        return generate(*args, keep=counted, **options)

    monkeypatch.setattr(answer_file, "generate_answers", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate(STUDENT, tmp_path / "results.json", "--batch_size", "3", "--max_new_tokens", "4")
    assert written == [3, 6]


@pytest.mark.parametrize("changed", ["model", "max_new_tokens", "prompt_suffix"])
def test_answers_of_another_making_are_not_taken(tmp_path, first, asked, changed):
    kept = first[0].with_name("results.answers.jsonl").read_text()
    (tmp_path / "results.answers.jsonl").write_text(kept)
    model = TEACHER if changed == "model" else STUDENT
    more = {"max_new_tokens": ["5"], "prompt_suffix": ["12", "--prompt_suffix", "Briefly."]}.get(changed, ["12"])
    evaluate(model, tmp_path / "results.json", "--max_new_tokens", *more)
    assert asked == [ROWS]
    before = kept.splitlines() if changed == "prompt_suffix" else []
    assert len(lines(tmp_path / "results.answers.jsonl")) == (len(before) or 1) + ROWS


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_figures_do_not_depend_on_the_batch(tmp_path, first, batch_size):
    more = ("--measures", "exact_match", "chair", "--max_new_tokens", "12", "--batch_size", str(batch_size))
    found = evaluate(STUDENT, tmp_path / "results.json", *more)
    assert found["student"]["measures"] == first[1]["student"]["measures"]
    given = [[each["given"] for each in lines(p.with_name("results.answers.jsonl"))[1:]] for p in
             (first[0], tmp_path / "results.json")]  # fmt: skip
    assert given[0] == given[1] and len(set(given[0])) > 5


@pytest.mark.parametrize("name", ["results.json", "results.teacher_answers.jsonl"])
def test_another_models_answers_are_compared(tmp_path, first, name):
    path, results = first
    more = ("--measures", "chair", "--max_new_tokens", "12", "--against", str(path.with_name(name)))
    found = evaluate(TEACHER, tmp_path / "results.json", *more)
    assert found["against"]["answers"] == str(path.with_name(name))
    figures = found["against"]["measures"]["chair"]
    theirs = results["teacher" if "teacher" in name else "student"]["measures"]["chair"]
    for figure, each in figures.items():
        own = results["teacher"]["measures"]["chair"][figure]["value"]
        assert each["difference"] == pytest.approx(own - theirs[figure]["value"])
        assert each["low"] <= each["difference"] <= each["high"] and 0 < each["p"] <= 1
    assert ("teacher" in name) == (figures["object_recall"]["difference"] == 0)


@pytest.mark.parametrize("measures", ["chair", ["chair", "exact_match"]])
def test_a_recipe_names_one_measure_or_several(tmp_path, first, measures):
    shutil.copy(first[0].with_name("results.answers.jsonl"), tmp_path)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"measures": measures, "max_new_tokens": 12}))
    results = evaluate(STUDENT, tmp_path / "results.json", "--config", str(tmp_path / "recipe.yaml"))
    names = [measures] if isinstance(measures, str) else measures
    assert results["student"]["measures"] == {name: first[1]["student"]["measures"][name] for name in names}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--measures", "bleu"], "`measures` names `bleu`, which there is not"),
        (["--against", "x.json"], "no `measures` are given to compare"),
        (["--measures", "exact_match", "--synonyms", "x.txt"], "does nothing without a measure of chair, object_halb"),
        (["--measures", "chair", "--synonyms", "x.txt"], "`synonyms` is `x.txt`, and no such file is there"),
        (["--max_new_tokens", "0"], "`max_new_tokens` is 0: give at least 1"),
        (["--train_dataset_name", "x.json"], "`blind` is false: give one of them"),
        (["--measures", "vqa_accuracy"], "Row 0 has no `answers`, which the measure `vqa_accuracy` reads"),
        (["--measures", "chair", "--against", "gone.json"], "`against` leads to `gone.answers.jsonl`, which is not"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_any_answer(tmp_path, asked, capsys, more, message):
    argv = ["evaluate", "--model", STUDENT, *SCENES, "--dataset_options", '{"rows": 3}', *more]
    assert main([*argv, "--output_file", str(tmp_path / "results.json")]) == 2
    assert message in capsys.readouterr().err
    assert asked == []


def test_answers_to_other_prompts_are_not_compared(tmp_path, first, capsys):
    argv = [
        "evaluate",
        "--model",
        STUDENT,
        *SCENES,
        "--dataset_options",
        '{"rows": 3}',
        "--measures",
        "chair",
    ]
    argv += ["--against", str(first[0]), "--prompt_suffix", "Briefly.", "--output_file", str(tmp_path / "results.json")]
    assert main(argv) == 2
    assert "has no answer to 3 of 3 rows, such as row 0" in capsys.readouterr().err


BENCHMARK = [
    {"question": "how many?", "answers": ["2", "two", "2", "3"], "category": "random", "id": 7},
    {"question": "how many?", "answers": ["3", "2", "2", "2"], "category": "random", "id": "eight"},
]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_columns_of_a_benchmark_are_read_from_any_file(tmp_path, monkeypatch, kind):
    picture = tmp_path / "a.png"
    Pictures.new("RGB", (8, 8), "red").save(picture)
    monkeypatch.setattr(answer_file, "generate_answers", lambda *args, **options: ["Two.", "blue"])
    path = tmp_path / f"rows.{kind}"
    measures = ["vqa_accuracy"]
    if kind == "jsonl":
        path.write_text("\n".join(json.dumps({**row, "image": "a.png"}) for row in BENCHMARK))
    elif kind == "csv":  # which has no lists
        path.write_text("question,answer,A,B\nwhich?,B,red,Two\nwhich?,two,two,blue\n")
        measures = ["multiple_choice"]
        answers = ["Two.", "blue", "A", "no"]  # right, not read, right, not read
        monkeypatch.setattr(answer_file, "generate_answers", lambda *args, **options: answers)
    else:
        texts = dict.fromkeys(("question", "place"), Value("string"))  # another `place` than the rows' own
        features = Features({**texts, "answers": List(Value("string")), "image": Image()})
        rows = {name: [row[name] for row in BENCHMARK] for name in ("question", "answers")} | {"place": ["here"] * 2}
        Dataset.from_dict({**rows, "image": [str(picture)] * 2}, features=features).to_parquet(path)
    argv = ["--dataset_name", str(path), "--blind", "false"]
    results = evaluate(STUDENT, tmp_path / "results.json", "--measures", *measures, options=argv)
    found = results["student"]["measures"]
    if kind == "csv":
        assert results["num_questions"] == 4
        assert found["multiple_choice"]["unread_choices"]["value"] == 1 / 2
        assert found["multiple_choice"]["circular_accuracy"]["value"] == 0
        assert found["multiple_choice"]["plain_accuracy"]["value"] == 1
    else:
        # of 2, 2, 2, 3 two others agree with the answer 2 for three annotators, three for one
        assert found["vqa_accuracy"]["vqa_accuracy"]["value"] == pytest.approx((3 * 2 / 3 + 1) / 4 / 2)
        assert results["student"]["exact_match"] == 0  # the most frequent answers are both 2
