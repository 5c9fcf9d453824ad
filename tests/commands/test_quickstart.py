"""The whole job, cut short: every stage runs, is judged, and the last is published and loaded where we are not."""

import json
import math
import shutil
from pathlib import Path

import pytest

from llava_mod_hf.commands import quickstart as qs
from llava_mod_hf.commands.quickstart import QuickstartArguments, load_elsewhere, plan_steps
from llava_mod_hf.commands.quickstart import run as quickstart
from llava_mod_hf.data.easy_vqa import COLORS, SHAPES

STAGES = ("adapt", "mimic_dense", "mimic_sparse", "prefer", "sft")
SCORES = ("exact_match", "hallucination_rate", "miss_rate", "balanced_accuracy")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qs, "plan_steps", lambda args: dict.fromkeys(qs.STAGES, 2))
        patch.setattr(qs.hf_logging, "set_verbosity_error", lambda: None)
        summary = quickstart(QuickstartArguments(str(folder), seed=3, num_questions=80))
    return folder, summary


def test_the_summary_says_what_was_measured(run):
    folder, summary = run
    written = json.loads((folder / "summary.json").read_text())
    assert written["seed"] == 3 and written["num_questions"] == 80 and written["seconds"] > 0
    assert tuple(written["stages"]) == STAGES
    for result in written["stages"].values():
        assert result["exact_match_by_kind"].keys() == {"color", "shape", "yes/no"}
        assert all(0 <= result[name] <= 1 for name in SCORES)
        assert math.isfinite(result["kl_to_teacher"]) and result["kl_to_teacher"] > 0
        assert result["params_active"] <= result["params_total"]
        assert result["seconds"] > 0 and math.isfinite(result["first_loss"]) and math.isfinite(result["last_loss"])
    assert [written["stages"][name]["steps"] for name in STAGES] == [2, 2, 2, 2, 4]  # sft: dense and sparse
    assert written["stages"].keys() == summary["stages"].keys()


def test_the_teacher_is_good_and_the_blind_baseline_is_blind(run):
    teacher, blind = run[1]["teacher"], run[1]["blind"]
    assert min(teacher["exact_match_by_kind"].values()) > 0.9
    assert blind["exact_match"] < 0.6 and blind["balanced_accuracy"] < 0.7


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
    assert len(published["questions"]) == 3
    # after so few steps an answer may be empty
    assert all(isinstance(question["given"], str) for question in published["questions"])
    assert published["expert_load"].keys() == {0, 2}


def test_the_repository_is_whole(run):
    folder, _ = run
    hub = folder / "hub" / "tiny-llava-mod"
    for name in ("README.md", "config.json", "model.safetensors", "modeling_llava_mod.py", "figures/losses.png"):
        assert (hub / name).is_file()
    card = (hub / "README.md").read_text()
    assert "drawn shapes" in card
    here = (str(folder), str(Path(qs.__file__).parent))
    for path in hub.rglob("*"):
        if path.suffix in {".md", ".yaml", ".json", ".py"}:
            assert not any(place in path.read_text() for place in here), path


def test_an_interrupted_run_is_taken_up(run, tmp_path, monkeypatch):
    folder, summary = run
    again = tmp_path / "run"
    shutil.copytree(folder, again)
    (again / "summary.json").unlink()
    shutil.rmtree(again / "hub")
    shutil.rmtree(again / "sft")
    (again / "plan.json").write_text(json.dumps({"seed": 3, "steps": dict.fromkeys(qs.STAGES, 2)}))
    started = []
    run_stage = qs.run_stage
    monkeypatch.setattr(qs, "run_stage", lambda name, *args: started.append(name) or run_stage(name, *args))
    resumed = quickstart(QuickstartArguments(str(again), seed=3, num_questions=80))
    assert started == ["sft"]
    assert resumed["resumed"] and not summary["resumed"]
    for name in STAGES:
        assert {key: resumed["stages"][name][key] for key in SCORES} == {
            key: summary["stages"][name][key] for key in SCORES
        }
    with pytest.raises(ValueError, match="is not empty"):
        quickstart(QuickstartArguments(str(again), seed=3))


def test_a_folder_that_does_not_load_is_noticed(run, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    question = {"image": "none.png", "question": f"is it {COLORS[0]} or a {SHAPES[0]}?"}
    with pytest.raises(ValueError, match="fresh process could not load"):
        load_elsewhere(tmp_path, [question])


def test_a_slow_machine_takes_fewer_steps_in_proportion(monkeypatch, tmp_path):
    args = QuickstartArguments(str(tmp_path / "run"), max_minutes=10)
    monkeypatch.setattr(qs, "seconds_per_step", lambda seed: 0.01)
    fast = plan_steps(args)
    assert fast == {name: qs.parse_stage(name, tmp_path, 0)[-1].max_steps for name in qs.STAGES}
    training = sum(count * qs.STAGES[name].step_cost for name, count in fast.items())
    fixed = qs.EVALUATION_COST * 6 + qs.PUBLISHING_COST + qs.CALIBRATION_STEPS
    monkeypatch.setattr(qs, "seconds_per_step", lambda seed: 600 / (fixed + training / 2))
    assert plan_steps(args) == {name: round(count / 2) for name, count in fast.items()}
    monkeypatch.setattr(qs, "seconds_per_step", lambda seed: 600 / (fixed + training / 5))
    with pytest.raises(ValueError, match="`--max-minutes` is 10"):
        plan_steps(args)
