"""The claims' plan, graph and statistics, without a training."""

import json

import claims
import claims_graph
import claims_quick
import pytest
import torch
from claims_arms import arm_of
from claims_graph import Node, run_all, with_inputs
from claims_statistics import interval

from helpers.scenes import described
from llava_mod_hf import loading
from llava_mod_hf.data.scene_rows import load
from llava_mod_hf.evaluation import answers
from llava_mod_hf.students import quantisation


@pytest.fixture(scope="module")
def plan():
    return claims.read_claims()


def test_every_arm_of_the_plan_can_be_built(plan):
    for name, claim in plan["claims"].items():
        assert {"section", "says", "measures", "against", "vary", "arms", "holds"} <= claim.keys()
        assert claim["against"] in claim["arms"]
        keys = [
            arm_of(plan["centre"], 0, **factors).answers(rows=8).key for _, _, factors in claims.arms_of(plan, name)
        ]
        # where no answer is wrong, ten times the rows are what the teacher of clean rows has seen
        assert len(keys) - len(set(keys)) == (name == "noise"), f"two arms of {name} are the same"
        assert {recipe.recipe for recipe in with_inputs([arm_of(plan["centre"], 0).model()])} >= {
            "scenes/1_adapt.yaml", "scenes/2_mimic_dense.yaml",
        }  # fmt: skip


def test_a_teacher_that_is_embedded_is_not_trained_again(plan):
    def teacher(**factors):
        return arm_of(plan["centre"], 0, **factors).teacher_node()

    assert teacher() == "embedded:scenes-teacher"
    assert teacher(teacher="clean") == "embedded:scenes-clean-teacher"
    assert isinstance(teacher(teacher="equal"), Node)
    assert isinstance(teacher(wrong_kind="uniform"), Node)
    assert isinstance(teacher(teacher_steps=9), Node)


def test_rates_are_picked_of_the_stage_that_is_claimed(plan):
    rates = {
        (name, arm): list(tried) for name in plan["claims"] for arm, tried in claims.validation_arms(plan, name).items()
    }
    assert ("noise", "supervised") in rates
    assert ("preference", "before") not in rates
    tried = claims.validation_arms(plan, "preference")["own samples, DPO, teacher"]
    assert [arm.prefer["learning_rate"] for arm in tried.values()] == plan["claims"]["preference"]["learning_rates"]
    assert len({arm.sparse() for arm in tried.values()}) == 1
    # pairs are right, so what is picked by them is judged on what is right
    assert next(iter(tried.values())).validation(8).options["wrong_answers"] == 0
    assert claims.validation_arms(plan, "noise")["supervised"][1e-3].validation(8).options["wrong_answers"] == 0.3


def test_an_unknown_factor_is_told(plan):
    with pytest.raises(ValueError, match="An arm has no `colour`: its factors are adapt_steps"):
        arm_of(plan["centre"], 0, colour=1)


def test_arms_share_what_they_share(plan):
    first, second = (arm_of(plan["centre"], 0, loss=loss) for loss in ("kl", "labels"))
    assert first.adapted() == second.adapted()
    assert first.dense() != second.dense()
    assert arm_of(plan["centre"], 1).adapted() != first.adapted()
    assert first.teacher_node() == arm_of(plan["centre"], 1).teacher_node()


def test_a_key_depends_on_the_inputs():
    inner = [Node("adapt", "scenes/1_adapt.yaml", {"seed": seed}) for seed in (0, 0, 1)]
    outer = [Node("mimic", "scenes/2_mimic_dense.yaml", {"student": node}) for node in inner]
    assert outer[0] == outer[1] != outer[2]
    assert with_inputs(outer) == [inner[0], outer[0], inner[2], outer[2]]


def test_a_key_depends_on_the_embedded_weights(monkeypatch):
    options = {"student": "embedded:scenes-teacher", "dataset_name": "embedded:scenes"}
    assert claims_graph.weights_hash("embedded:scenes-teacher") != claims_graph.weights_hash(
        "embedded:scenes-student-lm"
    )
    key = Node("mimic", None, options).key
    monkeypatch.setattr(claims_graph, "weights_hash", lambda name: "another")
    assert Node("mimic", None, options).key != key


def test_a_key_is_of_what_a_recipe_says():
    recipe, said = "scenes/1_adapt.yaml", claims_graph.read_recipe("scenes/1_adapt.yaml")
    key = Node("adapt", recipe).key
    assert Node("adapt", None, said).key == key
    assert Node("adapt", recipe, {"output_dir": "elsewhere", "logging_steps": 7}).key == key
    assert Node("adapt", recipe, {"max_steps": said["max_steps"] + 1}).key != key


@pytest.mark.parametrize("bits", [None, 8])
def test_answers_are_those_of_the_student_with_its_bits(tmp_path, monkeypatch, bits):
    monkeypatch.setattr(loading, "load_model_and_processor", lambda name: (torch.nn.Linear(1, 1), None))
    monkeypatch.setattr(quantisation, "load_quantised", lambda name, bits, dtype: torch.nn.Linear(bits, 1))
    monkeypatch.setattr(answers, "generate_answers", lambda model, *args, **kwargs: [str(model.in_features)] * 3)
    node = Node("answers", None, {"model": "a", "seed": 0, "rows": 3, **({"bits": bits} if bits else {})})
    claims_graph._write_answers(node, tmp_path, "cpu")
    found = json.loads((tmp_path / node.key / "answers.json").read_text())
    assert found["given"] == [str(bits or 1)] * 3
    assert found["answer"] == load("mixture", "test", 0, {"rows": 3})["answer"][:]


def test_a_failure_stops_what_needs_it_and_nothing_else(tmp_path, monkeypatch):
    class Pool:
        """Runs at once, in this process."""

        def __init__(self, *args, **kwargs):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def submit(self, function, node, root, *options):
            from concurrent.futures import Future

            future = Future()
            if node.options.get("broken"):
                future.set_exception(ValueError("broken"))
            else:
                (root / node.key).mkdir()
                (root / node.key / "done.json").write_text("{}")
                future.set_result(node.key)
            return future

    monkeypatch.setattr(claims_graph, "ProcessPoolExecutor", Pool)
    broken, whole = Node("adapt", None, {"broken": True}), Node("adapt", None, {"seed": 1})
    needs = [Node("mimic", None, {"student": node}) for node in (broken, whole)]
    failed = run_all(needs, tmp_path)
    assert failed == {broken: "ValueError: broken", needs[0]: f"needs {broken.key}"}
    assert needs[1].is_done(tmp_path)
    assert run_all([whole], tmp_path) == {}


def plan_of_two(tmp_path, **factors):
    """A plan of one claim, and its answers as they lie in a folder of runs."""
    plan = claims.read_claims()
    plan["claims"] = {"stages": {**plan["claims"]["stages"], "arms": {"sparse alone": factors, "other": {"rows": 9}}}}
    for node, built, _ in claims.final_nodes(plan, "stages", [0], tmp_path, tmp_path).values():
        for each in (node, built.model()):
            (tmp_path / each.key).mkdir(exist_ok=True)
            (tmp_path / each.key / "done.json").write_text('{"seconds": 1, "device": "cpu", "threads": 1}')
        columns = {"question": ["d"], "answer": ["a red circle"], "kind": ["describe"], "given": ["a red circle"]}
        (tmp_path / node.key / "answers.json").write_text(json.dumps(columns))
    return plan


def test_results_of_other_seeds_stay_and_those_of_another_plan_go(tmp_path):
    results = tmp_path / "results"
    plan = plan_of_two(tmp_path)
    claims.write_results(plan, ["stages"], [0], tmp_path, results)
    path = results / "stages.json"
    found = json.loads(path.read_text())
    key = claims.final_nodes(plan, "stages", [1], tmp_path, results)["", "sparse alone", 1][0].key
    found["runs"].append({**found["runs"][0], "seed": 1, "key": key})
    path.write_text(json.dumps(found))
    claims.write_results(plan, ["stages"], [0], tmp_path, results)
    seeds = [(run["arm"], run["seed"]) for run in json.loads(path.read_text())["runs"]]
    assert sorted(seeds) == [("other", 0), ("sparse alone", 0), ("sparse alone", 1)]

    changed = plan_of_two(tmp_path, learning_rate=1.0)
    claims.write_results(changed, ["stages"], [0], tmp_path, results)
    seeds = [(run["arm"], run["seed"]) for run in json.loads(path.read_text())["runs"]]
    assert sorted(seeds) == [("other", 0), ("sparse alone", 0)]


def test_what_another_machine_found_is_not_run_again(tmp_path):
    plan, results = plan_of_two(tmp_path), tmp_path / "results"
    before = claims.nodes_left(plan, ["stages"], [0], tmp_path / "new", results)
    claims.write_results(plan, ["stages"], [0], tmp_path, results)
    after = claims.nodes_left(plan, ["stages"], [0], tmp_path / "new", results)
    assert len(before) == 4
    assert after == before[:2]  # what the two arms' teachers answer is not known
    assert after[0].options["model"] == "embedded:scenes-teacher"
    path = results / "stages.json"
    found = json.loads(path.read_text())
    for run in found["runs"]:
        run["teacher"] = run["figures"]
    path.write_text(json.dumps(found))
    assert claims.nodes_left(plan, ["stages"], [0], tmp_path / "new", results) == []
    claims.write_results(plan, ["stages"], [0], tmp_path / "new", results)
    assert json.loads(path.read_text())["runs"] == found["runs"]


def test_a_picked_rate_is_kept(tmp_path, plan):
    nodes = [
        arm.validation(claims.VALIDATION_ROWS) for arm in claims.validation_arms(plan, "noise")["supervised"].values()
    ]
    for node, right in zip(nodes, (0.1, 0.9, 0.5), strict=True):
        columns = {name: [row[name] for row in described(right)] for name in ("question", "answer", "kind", "given")}
        (tmp_path / node.key).mkdir()
        (tmp_path / node.key / "answers.json").write_text(json.dumps(columns))
        (tmp_path / node.key / "done.json").write_text("{}")
    results = tmp_path / "results"
    picked = claims.picked_rates(plan, "noise", tmp_path, results)
    assert {arm: each["learning_rate"] for arm, each in picked.items()} == {"supervised": 2e-3}
    claims.write_results(plan, ["noise"], [0], tmp_path, results)
    kept = claims.picked_rates(plan, "noise", tmp_path / "new", results)
    assert kept["supervised"]["learning_rate"] == 2e-3
    assert not {node.key for node in nodes} & {
        node.key for node in claims.nodes_left(plan, ["noise"], [0], tmp_path / "new", results)
    }
    final = claims.nodes_left(plan, ["noise"], [0], tmp_path / "new", results, ["clean"])
    assert [node.options["seed"] for node in final if node.options["seed"] != 99] == [0]  # the arm that has its rate


def test_a_quick_claim_is_said_with_its_recall(plan):
    arms = claims_quick.planned(plan, 7)
    names = {*arms, "teacher"}
    answers = {name: described(0.6, 1) for name in names} | {
        "distilled": described(0.8, 2),
        "preferred": described(0.9, 3),
    }
    found = {entry["claim"]: entry for entry in claims_quick.entries(answers)}
    assert found["distilled_over_supervised"]["difference"] > 0.1
    assert found["distilled_over_supervised"]["holds"]
    assert not found["distilled_over_supervised_clean_teacher"]["holds"]
    # a hallucinated description here is one whose only thing is not found either
    lowers = found["preference_lowers_hallucination"]
    assert lowers["difference"] == pytest.approx(-lowers["recall_difference"])
    assert lowers["high"] < 0 < lowers["recall_low"]
    assert lowers["holds"]
    silent = [{**row, "given": ""} for row in answers["before"]]
    found = {entry["claim"]: entry for entry in claims_quick.entries(answers | {"preferred": silent})}
    silenced = found["preference_lowers_hallucination"]
    assert silenced["high"] < 0
    assert silenced["recall_low"] < -0.01
    assert not silenced["holds"]
    assert {"preference_over_sft_on_chosen", "distilled_over_supervised_clean_teacher"} <= found.keys()


def test_a_quick_claim_is_of_the_arms_of_the_plan(plan):
    arms, short = claims_quick.planned(plan, 7), claims_quick.planned(plan, 7, 0.01)
    assert arms["supervised"].loss == "labels"
    assert arms["distilled"].teacher_node() == "embedded:scenes-teacher"
    assert arms["distilled, clean teacher"].teacher_node() == "embedded:scenes-clean-teacher"
    assert {(arm.seed, arm.rows, arm.wrong_answers) for arm in arms.values()} == {(7, 6000, 0.3)}
    assert arms["preferred"].sparse() == arms["chosen"].sparse() == arms["before"].model()
    for name, rate in plan["quick"]["learning_rates"].items():
        assert (arms[name].prefer or {}).get("learning_rate", arms[name].learning_rate) == rate
    assert (arms["supervised"].dense_steps, short["supervised"].dense_steps) == (600, 6)
    assert short["preferred"].prefer["max_steps"] == 2
    assert short["preferred"].prefer["prompts"] == 64


def test_the_interval_is_students():
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 2.0 - 4.303 / 3**0.5, 2.0 + 4.303 / 3**0.5))


def test_some_arms_and_points_are_run_alone(tmp_path, plan):
    def left(**some):
        return set(claims.nodes_left(plan, ["stages"], [0], tmp_path, tmp_path, **some))

    every = left()
    assert left(arms=["sparse alone"]) | left(arms=["dense, then sparse"]) == every
    assert left(arms=["sparse alone"]) < every
    assert left(points=[""]) == every
    rates = claims.nodes_left(plan, ["noise"], [0], tmp_path, tmp_path, arms=["supervised"])
    assert len(rates) == len(plan["claims"]["noise"]["learning_rates"])
    for some in ({"arms": ["blue"]}, {"points": ["blue"]}):
        with pytest.raises(ValueError, match="There is no `blue` in the plan: give some of"):
            left(**some)
