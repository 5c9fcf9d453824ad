"""The whole job, cut short: every stage runs, is judged, and the last is published and loaded where we are not."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest

from llava_mod_hf.commands import quickstart as qs
from llava_mod_hf.commands import quickstart_plan as plan
from llava_mod_hf.commands import quickstart_report as report
from llava_mod_hf.commands.quickstart import QuickstartArguments, load_elsewhere
from llava_mod_hf.commands.quickstart import run as quickstart
from llava_mod_hf.commands.quickstart_plan import EASY_VQA, SCENES, WORLDS, plan_steps
from llava_mod_hf.data.arguments import DataArguments
from llava_mod_hf.data.easy_vqa import COLORS, SHAPES
from llava_mod_hf.data.load import load_rows
from llava_mod_hf.publishing.provenance import read_fields

STAGES = ("adapt", "mimic_dense", "mimic_sparse", "prefer", "sft")
SCORES = ("exact_match", "hallucination_rate", "miss_rate", "balanced_accuracy")


def short(world, *args):
    """A plan of two steps a stage."""
    return {name: 32 if stage.by_rows else 2 for name, stage in world.stages.items()}


@pytest.fixture(scope="module")
def patched():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qs, "plan_steps", short)
        patch.setattr(qs.hf_logging, "set_verbosity_error", lambda: None)
        yield patch


@pytest.fixture(scope="module")
def run(patched, tmp_path_factory):
    """Of the scenes."""
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    return folder, quickstart(QuickstartArguments(str(folder), seed=3, num_questions=80))


@pytest.fixture(scope="module")
def easy_run(patched, tmp_path_factory):
    """Of easy-VQA; that it loads elsewhere is seen in the scenes."""
    folder = tmp_path_factory.mktemp("quickstart") / "easy"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qs, "load_elsewhere", lambda folder, questions: (["red"] * len(questions), 0.0))
        return folder, quickstart(QuickstartArguments(str(folder), world="easy-vqa", seed=3, num_questions=60))


def test_the_summary_says_what_was_measured(run):
    folder, summary = run
    written = json.loads((folder / "summary.json").read_text())
    assert written["world"] == "scenes" and written["training_rows"]["wrong_answers"] == 0.3
    assert written["seed"] == 3 and written["num_questions"] == 80 and written["seconds"] > 0
    assert tuple(written["stages"]) == STAGES
    for result in (written["teacher"], written["blind"], *written["stages"].values()):
        assert {"describe", "presence (adversarial)", "count"} <= result["exact_match_by_kind"].keys()
        for name in ("exact_match", "chair_s", "object_recall"):
            value, low, high = result["intervals"][name]
            assert value == pytest.approx(result[name]) and 0 <= low <= value <= high <= 1
    for result in written["stages"].values():
        assert math.isfinite(result["kl_to_teacher"]) and result["kl_to_teacher"] > 0
        assert result["params_active"] <= result["params_total"]
        assert result["seconds"] > 0 and math.isfinite(result["first_loss"]) and math.isfinite(result["last_loss"])
    assert [written["stages"][name]["steps"] for name in STAGES] == [2, 2, 2, 2, 4]  # sft: dense and sparse
    assert written["stages"].keys() == summary["stages"].keys()


def test_differences_are_those_of_the_stages(run):
    differences, stages = run[1]["differences"], run[1]["stages"]
    assert differences.keys() == {"mimic_sparse - sft", "prefer - mimic_sparse"}
    for name in ("exact_match", "chair_s", "object_recall"):
        first, low, high = differences["mimic_sparse - sft"][name]
        assert first == pytest.approx(stages["mimic_sparse"][name] - stages["sft"][name])
        assert low <= first <= high


def test_the_student_learns_from_pairs_of_its_own(run):
    folder, summary = run
    found = summary["make_preferences"]
    assert found["prompts"] == 32 and 0 < found["rows"] <= 32 and found["seconds"] > 0
    assert read_fields(folder / "prefer" / "run.json", recipe=dict)["recipe"]["dataset_name"] == str(
        folder / "make_preferences"
    )
    rows = load_rows(DataArguments(str(folder / "make_preferences")), columns=("prompt", "chosen", "rejected"))
    assert all(chosen > rejected for chosen, rejected in zip(rows["chosen_score"], rows["rejected_score"], strict=True))
    assert set(rows["question"]) == {"describe the picture."}
    assert len(rows) == found["rows"]


def test_the_supervised_student_has_no_teacher_and_the_distilled_ones_rows(run):
    folder, _ = run
    for pair in (("mimic_dense", "sft_dense"), ("mimic_sparse", "sft")):
        one, other = (read_fields(folder / name / "run.json", recipe=dict)["recipe"] for name in pair)
        differing = {name for name in one.keys() | other.keys() if one.get(name) != other.get(name)}
        assert differing <= {"output_dir", "student", "kl_weight", "lm_weight"}
        assert (other["kl_weight"], other.get("lm_weight", 1)) == (0, 1)


def test_the_student_is_at_most_a_third_of_the_teacher(run):
    teacher, stages = run[1]["teacher"], run[1]["stages"]
    for name in STAGES:
        assert stages[name]["language_params_active"] <= teacher["language_params_active"] / 3
    assert stages["mimic_sparse"]["params_active"] < stages["mimic_sparse"]["params_total"]
    assert stages["mimic_dense"]["params_active"] == stages["mimic_dense"]["params_total"]


def test_upcycling_and_publishing_keep_the_logits(run):
    _, summary = run
    upcycling = summary["upcycling"]
    assert upcycling["max_logit_difference"] <= 1e-5 * max(1, upcycling["largest_logit"])
    published = summary["published"]
    assert published["max_logit_difference"] <= 1e-5
    assert {row["kind"] for row in published["questions"]} >= {"describe", "count", "presence (random)"}
    # after so few steps an answer may be empty
    assert all(isinstance(question["given"], str) for question in published["questions"])
    assert published["expert_load"].keys() == {0, 2}


def test_the_repository_is_whole(run):
    folder, _ = run
    hub = folder / "hub" / "scenes-llava-mod"
    for name in ("README.md", "config.json", "model.safetensors", "modeling_llava_mod.py", "figures/losses.png"):
        assert (hub / name).is_file()
    here = (str(folder), str(Path(qs.__file__).parent))
    for path in hub.rglob("*"):
        if path.suffix in {".md", ".yaml", ".json", ".py"}:
            assert not any(place in path.read_text() for place in here), path


def test_picture_and_page_are_there(run):
    folder, _ = run
    assert (folder / "summary.png").read_bytes().startswith(b"\x89PNG")
    assert str(folder / "mimic_sparse") in (folder / "summary.html").read_text()


@pytest.mark.slow
def test_easy_vqa_is_as_it_was(easy_run, capsys):
    folder, summary = easy_run
    assert tuple(summary["stages"]) == STAGES and "make_preferences" not in summary
    assert not (folder / "summary.html").exists() and not (folder / "summary.png").exists()
    for result in summary["stages"].values():
        assert result["exact_match_by_kind"].keys() == {"color", "shape", "yes/no"}
        assert all(0 <= result[name] <= 1 for name in SCORES)
    assert min(summary["teacher"]["exact_match_by_kind"].values()) > 0.9
    assert summary["blind"]["exact_match"] < 0.6 and summary["blind"]["balanced_accuracy"] < 0.7
    assert "drawn shapes" in (folder / "hub" / "tiny-llava-mod" / "README.md").read_text()
    report.show(summary, folder)
    lines = capsys.readouterr().out.splitlines()
    assert " ".join(lines[1].split()) == "all color shape yes/no hall. miss bal. KL active steps s"
    assert max(map(len, lines)) <= 80


@pytest.mark.slow
def test_an_interrupted_run_is_taken_up(run, tmp_path, monkeypatch):
    folder, summary = run
    again = tmp_path / "run"
    shutil.copytree(folder, again)
    (again / "summary.json").unlink()
    for name in ("hub", "sft"):
        shutil.rmtree(again / name)
    started = []
    stages = {name: started_by(stage, name, started) for name, stage in SCENES.stages.items()}
    monkeypatch.setitem(WORLDS, "scenes", dataclasses.replace(SCENES, stages=stages))
    monkeypatch.setattr(qs, "load_elsewhere", lambda folder, questions: ([""] * len(questions), 0.0))
    resumed = quickstart(QuickstartArguments(str(again), seed=3, num_questions=80))
    assert started == ["sft"]
    assert resumed["resumed"] and not summary["resumed"]
    for name in STAGES:
        assert {key: resumed["stages"][name][key] for key in SCORES} == {
            key: summary["stages"][name][key] for key in SCORES
        }
    with pytest.raises(ValueError, match="is not empty"):
        quickstart(QuickstartArguments(str(again), seed=3))


def started_by(stage, name, started):
    def run(*groups):
        started.append(name)
        return stage.run(*groups)

    return dataclasses.replace(stage, run=run)


@pytest.mark.parametrize("other", [{"seed": 4}, {"world": "easy-vqa"}])
def test_the_run_of_another_seed_or_world_is_not_taken_up(other, tmp_path):
    made_of = {"world": "scenes", "seed": 3}
    steps = short(SCENES)
    (tmp_path / "plan.json").write_text(json.dumps({**made_of, "steps": steps}))
    assert qs.start_or_resume(tmp_path, QuickstartArguments(str(tmp_path), **made_of)) == (steps, True)
    with pytest.raises(ValueError, match="holds no interrupted run of the world"):
        qs.start_or_resume(tmp_path, QuickstartArguments(str(tmp_path), **{**made_of, **other}))


def test_a_folder_that_does_not_load_is_noticed(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    question = {"image": "none.png", "question": f"is it {COLORS[0]} or a {SHAPES[0]}?"}
    with pytest.raises(ValueError, match="fresh process could not load"):
        load_elsewhere(tmp_path, [question])


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"world": "moon"}, "`world` is `moon`: give one of scenes, easy-vqa"),
        ({"num_questions": 0}, "`num_questions` is 0: give at least 1"),
    ],
)
def test_values_that_there_are_not_are_refused(values, told):
    with pytest.raises(ValueError, match=told):
        QuickstartArguments("runs/none", **values)


@pytest.mark.parametrize("world", [SCENES, EASY_VQA], ids=["scenes", "easy-vqa"])
def test_a_slow_machine_takes_fewer_steps_in_proportion(world, monkeypatch, tmp_path):
    monkeypatch.setattr(plan, "seconds_per_step", lambda world, seed: 0.01)
    fast = plan_steps(world, tmp_path, 0, 10)
    for name, stage in world.stages.items():
        groups = world.parse(name, tmp_path, 0)
        assert fast[name] == (groups[0].dataset_options["rows"] if stage.by_rows else groups[-1].max_steps)
        assert stage.length(world.parse(name, tmp_path, 0, *stage.of_length(groups, 7))) == 7
    training = sum(count * world.stages[name].step_cost for name, count in fast.items())
    fixed = world.evaluation_cost * 6 + world.publishing_cost + plan.CALIBRATION_STEPS
    monkeypatch.setattr(plan, "seconds_per_step", lambda world, seed: 600 / (fixed + training / 2))
    assert plan_steps(world, tmp_path, 0, 10) == {name: round(count / 2) for name, count in fast.items()}
    monkeypatch.setattr(plan, "seconds_per_step", lambda world, seed: 600 / (fixed + training / 5))
    with pytest.raises(ValueError, match="`--max-minutes` is 10"):
        plan_steps(world, tmp_path, 0, 10)


def test_a_world_has_its_own_time(monkeypatch, tmp_path):
    minutes = []
    monkeypatch.setattr(qs, "plan_steps", lambda world, folder, seed, given: minutes.append(given) or {})
    for number, values in enumerate(({}, {"world": "easy-vqa"}, {"max_minutes": 3})):
        folder = tmp_path / str(number)
        qs.start_or_resume(folder, QuickstartArguments(str(folder), **values))
    assert minutes == [5, 10, 3]
