"""`llava-mod`: what each command reads and writes, and one sentence for each mistake."""

import json
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from huggingface_hub import HfApi, snapshot_download

from llava_mod_cli import commands, main
from llava_mod_hf import loading, recipes
from llava_mod_hf.data import easy_vqa
from llava_mod_hf.loading import load_model_and_processor
from llava_mod_hf.publishing.checks import check_publishable

ROOT = Path(__file__).parents[2]
TINY_RECIPES = sorted((ROOT / "recipes" / "tiny").glob("*.yaml"))
RECIPE_COMMANDS = {"0": "pretrain", "1": "adapt", "2": "mimic", "3": "mimic", "4": "prefer"}


@pytest.fixture(scope="module")
def save(tmp_path_factory, make_student, processor):
    """`save(folder=None, **student)`: a tiny random checkpoint with its processor."""

    def save(folder=None, **student):
        folder = folder or tmp_path_factory.mktemp("student")
        make_student(**student).save_pretrained(folder)
        processor.save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def recipe(tmp_path):
    """`recipe(**values)`: a file for `mimic`; with nothing changed it would train."""

    def write(**values):
        path = tmp_path / "recipe.yaml"
        defaults = {"student": "s", "teacher": "t", "dataset_name": easy_vqa.DATASET, "output_dir": str(tmp_path / "o")}
        path.write_text(yaml.safe_dump({**defaults, "use_cpu": True, "bf16": False, **values}))
        return path

    return write


def parse(command, argv):
    return recipes.parse(commands()[command].groups(), argv)


def refused(capsys, *argv):
    """What a refused command writes: one sentence on standard error."""
    assert main([str(arg) for arg in argv]) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.err


# Help, commands, recipes


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_help_names_every_command(capsys, argv):
    assert main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("usage: llava-mod COMMAND")
    assert [line.split()[0] for line in lines[2:]] == list(commands())
    assert all(command.summary in line for line, command in zip(lines[2:], commands().values(), strict=True))


@pytest.mark.parametrize("command", commands())
def test_help_of_a_command_names_its_options(capsys, command):
    with pytest.raises(SystemExit) as exit_info:
        main([command, "--help"])
    assert exit_info.value.code == 0
    help_text = capsys.readouterr().out
    assert f"usage: llava-mod {command} " in help_text
    required = {"upcycle": "--student", "evaluate": "--model", "info": "--vision_tower", "publish": "--checkpoint"}
    required |= {"check": "--stage", "memory": "--recipes", "report": "--runs", "chat": "--image", "demo": "--teacher"}
    assert required.get(command, "--output_dir") in help_text


def test_unknown_command(capsys):
    message = refused(capsys, "distill", "--config", "recipe.yaml")
    assert message == f"llava-mod: there is no command `distill`: give one of {', '.join(commands())}.\n"


@pytest.mark.parametrize(
    ("mistyped", "hint"),
    [
        ("learning_rat", "did you mean `learning_rate`?"),
        ("moe_layer", "did you mean `moe_layers`?"),
        ("kl_wieght", "did you mean `kl_weight`?"),
        ("zzzzzz", "see `--help` for the keys."),
    ],
)
def test_mistyped_recipe_key(capsys, recipe, tmp_path, mistyped, hint):
    path = recipe(**{mistyped: 1})
    message = refused(capsys, "mimic", "--config", path)
    assert message == f"llava-mod mimic: The recipe `{path}` has the unknown key `{mistyped}`: {hint}\n"
    assert list(tmp_path.iterdir()) == [path]  # nothing was written


def test_a_key_of_another_command_is_unknown(capsys, recipe):
    assert "has the unknown key `beta`" in refused(capsys, "mimic", "--config", recipe(beta=0.1))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("student: [unclosed\n", "is not valid YAML: "),
        ("- student\n- teacher\n", "must hold `key: value` lines, and holds a list"),
        ("", "must hold `key: value` lines, and is empty"),
    ],
)
def test_recipe_that_is_none(capsys, tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    error = refused(capsys, "mimic", "--config", path)
    assert f"The recipe `{path}` {message}" in error
    assert error.count("\n") == 1


def test_missing_recipe(capsys, tmp_path):
    assert f"The recipe `{tmp_path}/no.yaml` does not exist" in refused(
        capsys, "mimic", "--config", tmp_path / "no.yaml"
    )


@pytest.mark.parametrize(
    "argv", [["--learning_rates", "1"], ["--learning_rat", "1"], ["--max_steps", "many"], ["--student"]]
)
def test_bad_option(capsys, recipe, tmp_path, argv):
    try:
        code = main(["mimic", "--config", str(recipe()), *argv])
    except SystemExit as exit_info:
        code = exit_info.code
    assert code == 2
    assert argv[0] in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_missing_required_option(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["upcycle"])
    assert exit_info.value.code == 2
    assert "--student" in capsys.readouterr().err


def test_the_command_line_overrides_the_recipe(recipe):
    path = str(recipe(max_steps=7, kl_weight=0.5))
    data, distill, upcycle, mimic = parse("mimic", ["--config", path, "--max_steps", "3", "--teacher", "other"])
    assert (mimic.max_steps, mimic.kl_weight, distill.teacher, distill.student) == (3, 0.5, "other", "s")
    assert (data.dataset_name, upcycle.moe_layers) == (easy_vqa.DATASET, None)


def test_both_ways_to_give_the_recipe(recipe):
    path = str(recipe(kl_weight=0.5))
    assert parse("mimic", [f"--config={path}"])[-1].kl_weight == 0.5


@pytest.mark.parametrize("path", TINY_RECIPES, ids=lambda path: path.stem)
def test_tiny_recipes_parse(path):
    values = yaml.safe_load(path.read_text())
    groups = parse(RECIPE_COMMANDS[path.name[0]], ["--config", str(path)])
    for key, value in values.items():
        (group,) = [group for group in groups if hasattr(group, key)]  # one reader of each key
        read = getattr(group, key)
        assert getattr(read, "value", read) == value or key == "report_to", key
    assert f"--config recipes/tiny/{path.name}" in path.read_text()


def test_there_is_a_recipe_for_each_stage():
    assert {path.name[0] for path in TINY_RECIPES} == set(RECIPE_COMMANDS)
    assert all(recipes.packaged("recipes", f"tiny/{path.name}") == path for path in TINY_RECIPES)


# upcycle


def test_upcycle(save, tmp_path):
    dense = save(moe_layers=[])
    path = tmp_path / "upcycle.yaml"
    path.write_text(yaml.safe_dump({"student": str(dense), "moe_layers": ["second_half"], "num_experts": 3}))
    argv = ["--config", str(path), "--num_experts_per_tok", "1", "--output_dir", str(tmp_path / "sparse")]
    (dense / "run.json").write_text("{}")
    assert main(["upcycle", *argv]) == 0
    # what the card of a student made of it will tell of the stages before
    assert (tmp_path / "sparse" / "run.json").read_text() == "{}"
    sparse, processor = load_model_and_processor(str(tmp_path / "sparse"))
    assert sparse.config.moe_layers == [1, 2]
    assert (sparse.config.num_experts, sparse.config.num_experts_per_tok) == (3, 1)
    assert processor.chat_template
    assert {file.name for file in (tmp_path / "sparse").glob("*.py")} == {
        "configuration_llava_mod.py",
        "modeling_llava_mod.py",
        "moe_llava_mod.py",
    }
    assert load_model_and_processor(str(dense))[0].config.moe_layers == []


@pytest.mark.parametrize(("option", "value"), [("expert_rank", 2), ("use_residual", True)])
def test_upcycle_takes_every_kind_of_experts(option, value, save, tmp_path):
    argv = ["--student", str(save(moe_layers=[])), "--output_dir", str(tmp_path / "sparse"), f"--{option}", str(value)]
    assert main(["upcycle", *argv]) == 0
    assert getattr(load_model_and_processor(str(tmp_path / "sparse"))[0].config, option) == value


@pytest.mark.parametrize(
    ("given", "expected"), [(["0", "2"], [0, 2]), (["1"], [1]), (["all"], [0, 1, 2]), (None, [0, 2])]
)
def test_upcycle_takes_placements_and_indices(save, tmp_path, given, expected):
    layers = ["--moe_layers", *given] if given else []
    assert main(["upcycle", "--student", str(save(moe_layers=[])), "--output_dir", str(tmp_path / "o"), *layers]) == 0
    assert json.loads((tmp_path / "o" / "config.json").read_text())["text_config"]["moe_layers"] == expected


@pytest.mark.parametrize(("given", "expected"), [("all", [0, 1, 2]), (1, [1]), ([0, 2], [0, 2])])
def test_moe_layers_in_a_recipe_may_be_one_value(save, tmp_path, given, expected):
    path = tmp_path / "upcycle.yaml"
    path.write_text(yaml.safe_dump({"student": str(save(moe_layers=[])), "moe_layers": given}))
    assert main(["upcycle", "--config", str(path), "--output_dir", str(tmp_path / "o")]) == 0
    assert json.loads((tmp_path / "o" / "config.json").read_text())["text_config"]["moe_layers"] == expected


@pytest.mark.parametrize(
    ("layers", "message"),
    [(["odd"], "`layers` is 'odd': give one of alternate"), (["7"], "3 layers"), (["0", "all"], "moe_layers")],
)
def test_upcycle_refuses_unknown_layers(capsys, save, tmp_path, layers, message):
    student = save(moe_layers=[])
    assert message in refused(
        capsys, "upcycle", "--student", student, "--output_dir", tmp_path / "o", "--moe_layers", *layers
    )
    assert not (tmp_path / "o").exists()


def test_upcycle_refuses_a_sparse_student_and_a_finished_run(capsys, save, tmp_path):
    student = save()
    assert "sparse already" in refused(capsys, "upcycle", "--student", student, "--output_dir", tmp_path / "o")
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "run.json").write_text("{}")
    assert "holds a finished run" in refused(capsys, "upcycle", "--student", student, "--output_dir", tmp_path / "done")


def test_a_student_that_is_not_there(capsys, tmp_path):
    missing = tmp_path / "no-such-student"
    message = refused(capsys, "upcycle", "--student", missing, "--output_dir", tmp_path / "o")
    assert str(missing) in message
    message = refused(capsys, "upcycle", "--student", "embedded:giant", "--output_dir", tmp_path / "o")
    assert "There is no model `embedded:giant`" in message


# evaluate and publish


@pytest.fixture(scope="module")
def chain(save, tmp_path_factory):
    """Folders as two stages leave them, the last one evaluated: `{stage: folder}`."""
    root = tmp_path_factory.mktemp("chain")
    folders = {"adapt": save(root / "adapt", moe_layers=[]), "prefer": save(root / "prefer")}
    teacher = str(save(root / "teacher", moe_layers=[], seed=1))
    logs = [{"step": step, "loss": 2.0 / step} for step in (1, 2)]
    stages = {
        "adapt": {"language_model": "someone/language-model", "vision_tower": teacher, "dataset_config": "captions"},
        "prefer": {"student": str(folders["adapt"]), "teacher": teacher, "dataset_config": "preferences"},
    }
    for stage, values in stages.items():
        run = {"stage": stage, "recipe": {"dataset_name": easy_vqa.DATASET, **values}, "log_history": logs}
        (folders[stage] / "run.json").write_text(json.dumps(run))
    argv = ["--dataset_name", easy_vqa.DATASET, "--dataset_config", "questions", "--max_samples", "40"]
    assert main(["evaluate", "--model", str(folders["prefer"]), "--teacher", teacher, *argv]) == 0
    return folders


def test_evaluate_writes_all_measures(chain):
    results = json.loads((chain["prefer"] / "results.json").read_text())
    assert set(results) >= {"student", "teacher", "blind", "dataset", "num_questions"}
    assert (results["dataset"], results["num_questions"]) == (easy_vqa.DATASET, 40)
    assert set(results["student"]["exact_match_by_kind"]) == {"yes/no", "color", "shape"}
    assert results["student"]["kl_to_teacher"] > 0
    assert results["teacher"]["kl_to_teacher"] is None
    assert results["student"]["params_total"] > results["student"]["params_active"]
    assert results["teacher"]["params_total"] == results["teacher"]["params_active"]


def test_the_blind_baseline_learns_from_all_training_rows(chain):
    """`max_samples` thins the questions that are asked, not what the baseline has seen."""
    results = json.loads((chain["prefer"] / "results.json").read_text())
    rows = easy_vqa.load("questions", "test").select(range(40))
    seen = {row["question"]: row["answer"] for row in easy_vqa.balanced(easy_vqa.questions("train"), 0)}
    assert set(rows["question"]) <= seen.keys()
    most_frequent = easy_vqa.most_frequent_answers(easy_vqa.balanced(easy_vqa.questions("train"), 0))
    hits = [
        most_frequent[question] == answer for question, answer in zip(rows["question"], rows["answer"], strict=True)
    ]
    assert results["blind"]["exact_match"] == pytest.approx(sum(hits) / len(hits))


def test_evaluate_a_local_file_into_another_file(save, tmp_path, capsys):
    for name, answer in (("rows", "yes"), ("training", "no")):
        row = {
            "images": [],
            "prompt": [{"role": "user", "content": "is it?"}],
            "completion": [{"role": "assistant", "content": answer}],
            "question": "is it?",
            "answer": answer,
            "kind": "yes/no",
        }
        Dataset.from_list([row]).to_json(tmp_path / f"{name}.jsonl")
    output_file = tmp_path / "elsewhere.json"
    student = save()
    argv = ["--model", student, "--dataset_name", tmp_path / "rows.jsonl", "--output_file", output_file]
    message = refused(capsys, "evaluate", *argv)  # one file: the blind baseline would learn what it is measured by
    assert "is one file, without splits" in message and "`train_dataset_name`" in message
    again = tmp_path / ".." / tmp_path.name / "rows.jsonl"
    assert "is one file" in refused(capsys, "evaluate", *argv, "--train_dataset_name", again)
    argv += ["--train_dataset_name", tmp_path / "training.jsonl"]
    assert main(["evaluate", *map(str, argv)]) == 0
    results = json.loads(output_file.read_text())
    assert results["teacher"] is None
    assert results["student"]["kl_to_teacher"] is None
    assert results["blind"]["exact_match"] == 0.0
    assert not (student / "results.json").exists()


def test_evaluate_measures_all_rows(capsys, tmp_path):
    message = refused(
        capsys, "evaluate", "--model", tmp_path, "--dataset_name", easy_vqa.DATASET, "--streaming", "true"
    )
    assert "`streaming` is true, and measures are of all rows" in message


def test_evaluate_needs_a_folder_to_write_to(capsys, tmp_path):
    message = refused(capsys, "evaluate", "--model", tmp_path / "no", "--dataset_name", easy_vqa.DATASET)
    assert f"`{tmp_path}/no` is no folder to write the results to: give `output_file`" in message


def test_publish_pushes_in_one_commit(chain, tmp_path, hub):
    folder = tmp_path / "tiny"
    argv = ["publish", "--checkpoint", str(chain["prefer"]), "--output-dir", str(folder), "--push-to", "me/student"]
    assert main([*argv, "--private", "true"]) == 0
    api = HfApi(endpoint=hub.url)
    assert len(api.list_repo_commits("me/student")) == 2  # the Hub's own first one, and ours
    assert api.model_info("me/student").private
    pulled = Path(snapshot_download("me/student", local_dir=tmp_path / "pulled"))
    for path in check_publishable(folder):
        assert (pulled / path.relative_to(folder)).read_bytes() == path.read_bytes()


def test_publish_writes_a_whole_repository(chain, tmp_path):
    assert main(["publish", "--checkpoint", str(chain["prefer"]), "--output_dir", str(tmp_path / "tiny")]) == 0
    folder = tmp_path / "tiny"
    files = {path.relative_to(folder).as_posix() for path in check_publishable(folder)}
    assert {"README.md", "config.json", "model.safetensors", "modeling_llava_mod.py", "results.json"} <= files
    assert {"figures/losses.png", "figures/expert_load.png", "recipe.yaml"} <= files
    assert not files & {"run.json", "training_args.bin"}
    stages = list(yaml.safe_load_all((folder / "recipe.yaml").read_text()))
    assert [stage["stage"] for stage in stages] == ["adapt", "prefer"]  # the whole way, the first stage first
    assert "someone/language-model" in (folder / "README.md").read_text()
    loaded, _ = load_model_and_processor(str(folder))
    assert loaded.config.moe_layers == [0, 2]


def test_publish_needs_a_finished_and_evaluated_stage(capsys, chain, save, tmp_path):
    argv = ["--output_dir", tmp_path / "tiny"]
    message = refused(capsys, "publish", "--checkpoint", chain["adapt"], *argv)
    assert f"`{chain['adapt']}` has no `results.json`: run `llava-mod evaluate" in message
    student = save()
    assert "has no `run.json`" in refused(capsys, "publish", "--checkpoint", student, *argv)
    assert list(tmp_path.iterdir()) == []


# quickstart


def test_quickstart_refuses_a_folder_that_holds_something(capsys, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert f"`{tmp_path}` is not empty" in refused(capsys, "quickstart", "--output-dir", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.skipif(
    not (loading.WEIGHTS / "tiny-teacher" / "config.json").is_file(), reason="needs the embedded weights"
)
@pytest.mark.slow
def test_quickstart_refuses_too_little_time(capsys, tmp_path, monkeypatch):
    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):  # it sets them: put back afterwards
        monkeypatch.setenv(name, "1")
    message = refused(capsys, "quickstart", "--output-dir", tmp_path / "run", "--max-minutes", "0.01")
    assert "`--max-minutes` is 0.01, and a quarter of the recipes' steps would take about" in message
    assert list(tmp_path.iterdir()) == []
