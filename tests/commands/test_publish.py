"""`llava-mod publish`, and the push of a run's folder: what they tell, what they keep, and how they refuse."""

import json
import re
import shutil

import pytest
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from helpers.disk import files_of_at_most
from helpers.leaks import find_leaks, private_words
from helpers.publishing import tree
from llava_mod_cli import main
from llava_mod_hf import push_checkpoint
from llava_mod_hf.fingerprints import weights_hash
from llava_mod_hf.loading import load_model_and_processor

REPO = "me/student"
LOGS = [{"step": step, "loss": 2.0 / step} for step in (1, 2)]


@pytest.fixture(scope="module")
def saved(make_student, processor, tmp_path_factory):
    """A checkpoint as a stage saves one: of a model and a processor that were themselves loaded from a folder."""
    first, second = tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("second")
    make_student().save_pretrained(first)
    processor.save_pretrained(first)
    for part in load_model_and_processor(str(first)):
        part.save_pretrained(second)
    return second


@pytest.fixture
def run(saved, tmp_path):
    """The folder of a finished and evaluated stage, whose options name files that are no longer there."""
    folder = shutil.copytree(saved, tmp_path / "runs" / "prefer")
    home = str(tmp_path)
    recipe = {
        "student": f"{home}/runs/mimic",
        "teacher": f"{home}/models/big-teacher",
        "dataset_name": f"{home}/data/rows.jsonl",
        "dataset_config": "captions",
        "learning_rate": 1e-3,
        "output_dir": f"{home}/runs/prefer",
        "logging_dir": f"{home}/logs",
        "run_name": f"{home}/runs/prefer",
        "deepspeed": f"{home}/zero3.json",
        "data_files": [f"{home}/data/a.parquet", "someone/rows"],
        "model_init_kwargs": {"cache_dir": f"{home}/cache", "note": f"read from {home}/notes.txt, then trained"},
    }
    write(folder / "run.json", {"stage": "prefer", "recipe": recipe, "log_history": LOGS, "steps": 2, "last_loss": 1.0})
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    results = {
        "student": {"exact_match": 0.5, "exact_match_by_kind": {"yes/no": 0.5}},
        "teacher": None,
        "blind": {"exact_match": 0.25},
        "dataset": f"{home}/data/rows.jsonl",
        "expert_load": {"0": [0.25] * 4, "2": [0.25] * 4},
        "num_questions": 4,
    }
    write(folder / "results.json", results)
    return folder


def write(path, value):
    path.write_text(json.dumps(value))


def change(path, **values):
    write(path, {**json.loads(path.read_text()), **values})


def publish(run, *more):
    return main(["publish", "--checkpoint", str(run), "--output_dir", str(run.parent / "tiny"), *more])


def refused(capsys, *argv):
    """Standard error of a command that was refused in one sentence."""
    assert publish(*argv) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("llava-mod publish: ") and message.endswith(".")
    return message


# what may be told


def test_publish_tells_nothing_of_this_machine(run, hub, monkeypatch, tmp_path):
    words = private_words(monkeypatch, tmp_path, hub.token)
    assert publish(run, "--push_to", REPO) == 0
    assert find_leaks(run.parent / "tiny", words) == []
    assert find_leaks(hub.received(), words) == []
    assert len(hub.repos[REPO].branches["main"].files) > 12


def test_pushing_the_folder_of_a_run_tells_nothing_of_this_machine(run, hub, monkeypatch, tmp_path):
    words = private_words(monkeypatch, tmp_path, hub.token)
    (run / "checkpoint-2").mkdir()
    (run / "checkpoint-2" / "training_args.bin").write_bytes(hub.token.encode())
    (run / "training_args.bin").write_bytes(hub.token.encode())
    (run / "runs" / "Jan01_qzhost").mkdir(parents=True)
    (run / "runs" / "Jan01_qzhost" / "events.out.tfevents.1.qzhost.0").write_bytes(b"log")
    kept_here = {"dropped_rows.jsonl", "examples.jsonl", "router.jsonl"}  # words of rows
    kept_here |= {"report.html", "report.png", "report_routers.png"}
    for name in kept_here:
        (run / name).write_text("{}\n")
    push_checkpoint(run, REPO)
    assert find_leaks(hub.received(), words) == []
    files = hub.repos[REPO].branches["main"].files
    assert {"README.md", "config.json", "model.safetensors", "recipe.yaml", "results.json"} <= files.keys()
    assert not kept_here & files.keys()


def test_names_of_this_machine_are_told_by_their_last_part_and_link_nowhere(run, tmp_path):
    assert publish(run) == 0
    folder = run.parent / "tiny"
    (recipe,) = yaml.safe_load_all((folder / "recipe.yaml").read_text())
    assert recipe == {
        "stage": "prefer",
        "student": "mimic",
        "teacher": "big-teacher",
        "dataset_name": "rows.jsonl",
        "dataset_config": "captions",
        "learning_rate": 1e-3,
        "run_name": "prefer",
        "deepspeed": "zero3.json",
        "data_files": ["a.parquet", "someone/rows"],
        "model_init_kwargs": {"cache_dir": "cache", "note": "read from notes.txt, then trained"},
    }
    card = ModelCard.load(folder / "README.md")
    assert (card.data.base_model, card.data.datasets) == (None, None)
    assert "teacher: `big-teacher`" in card.text and "- rows.jsonl" in card.text
    assert {result.dataset_type for result in card.data.eval_results} == {"local"}
    assert {result.dataset_name for result in card.data.eval_results} == {"rows.jsonl"}
    assert not (folder / ".eval_results").exists()  # it would link to a benchmark of this name


@pytest.mark.parametrize("where", ["of the run", "of the process"])
def test_a_relative_folder_is_no_hub_id(run, monkeypatch, tmp_path, where):
    """It looks like one, and is not there from every folder that `publish` may be called in."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path if where == "of the process" else tmp_path / "elsewhere")
    (tmp_path / "data" / "rows").mkdir(parents=True)
    recipe = {"output_dir": "runs/prefer", "teacher": "runs/removed", "dataset_name": "data/rows", "student": "a/b"}
    change(run / "run.json", recipe=recipe)
    assert publish(run) == 0
    card = ModelCard.load(run.parent / "tiny" / "README.md")
    assert (card.data.base_model, card.data.datasets) == (["a/b"], None)
    assert "teacher_model" not in card.data.to_dict()
    assert "runs/removed" not in card.content and "data/rows" not in card.content


def harness_results(run, name):
    """A folder with what lm-eval writes of a model of that name."""
    found = {"results": {"pope": {"accuracy,none": 0.75}}, "configs": {"pope": {"dataset_path": str(run / "a.jsonl")}}}
    counts = {"n-samples": {"pope": {"original": 4, "effective": 4}}}
    (run.parent / "out").mkdir()
    write(run.parent / "out" / "results_1.json", {**found, **counts, "model_name": name, "lm_eval_version": "0.4.13"})
    return str(run.parent / "out")


def test_results_of_a_harness_are_told_in_public_names(run):
    assert publish(run, "--harness_results", harness_results(run, str(run))) == 0
    text = (run.parent / "tiny" / "README.md").read_text()
    assert "| lm-eval 0.4.13 | pope | a.jsonl | 4 | accuracy | 0.750 |" in text and str(run) not in text


def test_results_of_another_model_are_refused(capsys, run):
    message = refused(capsys, run, "--harness_results", harness_results(run, "somebody/else"))
    assert "is of the model `somebody/else`" in message and not (run.parent / "tiny").exists()


def test_what_is_known_is_in_the_metadata(run):
    recipe = {"student": "someone/student", "teacher": "someone/teacher", "dataset_name": "someone/rows"}
    change(run / "run.json", recipe=recipe)
    change(run / "results.json", dataset="someone/questions")
    assert publish(run, "--license", "mit") == 0
    data = ModelCard.load(run.parent / "tiny" / "README.md").data
    assert (data.base_model, data.base_model_relation) == (["someone/student"], "finetune")
    assert (data.datasets, data.teacher_model, data.license) == (["someone/rows"], ["someone/teacher"], "mit")
    assert {result.dataset_type for result in data.eval_results} == {"someone/questions"}
    assert (run.parent / "tiny" / ".eval_results" / "someone-questions.yaml").is_file()


def test_no_licence_is_claimed_that_nobody_gave(run):
    assert publish(run) == 0
    card = ModelCard.load(run.parent / "tiny" / "README.md")
    assert card.data.license is None and "No licence was stated" in card.text


# refusals


REST = '"dataset": "x", "expert_load": {}'


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("results.json", "{}", "results.json` lacks `student`"),
        ("results.json", '{"student": {}, "dataset": "x"}', "results.json` lacks `expert_load`"),
        ("results.json", f'{{"student": 3, {REST}}}', "results.json` lacks `student`"),
        ("results.json", f'{{"student": {{}}, {REST}}}', "without `exact_match`"),
        ("results.json", f'{{"student": {{"exact_match": "x"}}, {REST}}}', "`exact_match` is x"),
        ("results.json", f'{{"student": {{"exact_match": 1, "exact_match_by_kind": 3}}, {REST}}}', "by_kind` is 3"),
        ("results.json", '{"student": {}, "dataset": "x", "expert_load": {"a": [1]}}', "is no layer with its shares"),
        ("results.json", '{"student": {}, "dataset": "x", "expert_load": {"0": 1}}', "is no layer with its shares"),
        ("results.json", '{"student"', "results.json` is no JSON"),
        ("results.json", "[]", "results.json` holds a list"),
        ("run.json", "{}", "run.json` lacks `stage`"),
        ("run.json", "not json", "run.json` is no JSON"),
        ("run.json", '{"stage": "prefer", "recipe": {}}', "run.json` lacks `log_history`"),
    ],
)
def test_a_damaged_file_is_named(capsys, run, name, content, expected):
    (run / name).write_text(content)
    assert expected in refused(capsys, run)
    assert not (run.parent / "tiny").exists()


def test_results_of_other_weights_are_refused(capsys, run, hub):
    change(run / "results.json", setup={"weights": weights_hash(run)})
    assert publish(run, "--push_to", REPO) == 0
    published = run.parent / "tiny"
    assert json.loads((published / "results.json").read_text())["weights"] == weights_hash(published)

    commits = len(hub.repos[REPO].commits())
    for folder in (run, published):
        weights = load_file(folder / "model.safetensors")
        first = next(name for name, value in weights.items() if value.is_floating_point())
        weights[first] += 1
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "results.json` has the results of other weights" in refused(capsys, run)
    for folder in (run, published):
        with pytest.raises(ValueError, match="has the results of other weights .*run `llava-mod evaluate --model"):
            push_checkpoint(folder, REPO)
    assert len(hub.repos[REPO].commits()) == commits


@pytest.mark.parametrize(
    ("step", "how", "expected"), [("commit", "drop", "connection to .* broke"), ("create", "html", "else than JSON")]
)
def test_a_hub_that_fails_is_one_sentence_and_half_pushes_nothing(capsys, run, hub, step, how, expected):
    hub.fail[step] = how
    assert re.search(expected, refused(capsys, run, "--push_to", REPO))
    assert [commit.message for repo in hub.repos.values() for commit in repo.commits()] in ([], ["initial commit"])


@pytest.mark.parametrize("limit", [1_000, 20_000, 60_000])
def test_a_full_disk_is_one_sentence_and_leaves_what_was_there(capsys, run, limit):
    """Files beyond a limit of this process cannot be written, as on a full disk: code, figures or weights."""
    assert publish(run) == 0
    before = tree(run.parent / "tiny")
    with files_of_at_most(limit):
        message = refused(capsys, run)
    assert re.search(r"tiny` could not be written \(.*\): it is as it was before", message), message
    assert tree(run.parent / "tiny") == before
    assert sorted(path.name for path in run.parent.iterdir()) == ["prefer", "tiny"]


@pytest.mark.parametrize("option", [("--tag", "v1"), ("--private", "true"), ("--gated", "auto"), ("--revision", "x")])
def test_an_option_of_a_push_without_one_is_refused(capsys, run, option):
    assert f"`{option[0][2:]}` is" in (message := refused(capsys, run, *option)) and "without `push_to`" in message


def test_a_push_goes_where_it_is_told(run, hub):
    options = {"private": "true", "revision": "prefer", "tag": "v1", "gated": "manual"}
    assert (
        publish(run, "--push_to", REPO, *(word for name, value in options.items() for word in (f"--{name}", value)))
        == 0
    )
    repo = hub.repos[REPO]
    assert (repo.private, repo.gated, repo.tags) == (True, "manual", {"v1": repo.branches["prefer"]})
    assert "README.md" in repo.branches["prefer"].files and "README.md" not in repo.branches["main"].files


def test_the_stages_of_a_family_are_in_one_collection(hub, run, capsys):
    for name in ("tiny-a", "tiny-b", "tiny-a"):
        assert publish(run, "--push_to", f"me/{name}", "--collection", "Tiny students", "--private", "true") == 0
    ((slug, told),) = hub.collections.items()
    assert slug.startswith("me/tiny-students-") and told["private"]
    assert [(item["type"], item["id"]) for item in told["items"]] == [("model", "me/tiny-a"), ("model", "me/tiny-b")]
    assert told["items"][0]["note"] == {"text": "The last stage was prefer."}


@pytest.mark.parametrize(
    ("step", "status", "advice"),
    [("collection", 403, "give another"), ("item", 500, "publish again"), ("item", 429, "publish again")],
)
def test_a_collection_that_fails_leaves_the_push(hub, run, capsys, step, status, advice):
    hub.fail[step] = status
    message = refused(capsys, run, "--push_to", REPO, "--collection", "Tiny students")
    assert f"`{REPO}` is pushed, and could not be put into the collection `Tiny students` of `me`" in message
    assert advice in message and len(hub.repos[REPO].commits()) == 2


def test_a_collection_without_a_push(capsys, run):
    assert "`collection` is 'Tiny students', which does nothing without `push_to`" in refused(
        capsys, run, "--collection", "Tiny students"
    )
