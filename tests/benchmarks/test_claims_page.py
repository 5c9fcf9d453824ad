"""What the page of the claims and its figure say of results."""

import json

import claims
import claims_figure
import claims_page
import claims_verdict
import pytest
from PIL import Image


@pytest.fixture(scope="module")
def plan():
    return claims.read_claims()


def test_the_page_has_a_table_of_differences(plan, tmp_path):
    runs = [
        {"point": "", "arm": arm, "seed": seed, "figures": dict.fromkeys(claims_verdict.NAMES, value + 0.01 * seed)}
        for arm, value in (("sparse alone", 0.5), ("dense, then sparse", 0.6))
        for seed in (0, 1)
    ]
    (tmp_path / "stages.json").write_text(json.dumps({"runs": runs, "picked": []}))
    text = "\n".join(claims_page.page_lines(plan, list(plan["claims"]), tmp_path))
    assert "| dense, then sparse | 2 | +10.0 ± 0.0 |" in text
    assert "Exact match against “sparse alone”, above: dense, then sparse (+10.0 ± 0.0)." in text
    assert "## b. Dense-to-dense then" in text
    assert "## a." not in text


def runs_of(values, seeds=5, teacher=0.45):
    """Results in which every measure of an arm is `values` of it, and a little more with each seed."""
    return [
        {"point": point, "arm": arm, "seed": seed, "figures": dict.fromkeys(claims_verdict.NAMES, value + 0.001 * seed),
         "teacher": dict.fromkeys(claims_verdict.NAMES, teacher)}
        for (point, arm), value in values.items() for seed in range(seeds)
    ]  # fmt: skip


def verdict(claim, values, **options):
    return "\n".join(claims_verdict.verdict_lines(claim, claims_verdict.by_arm(runs_of(values, **options)), 5))


def test_the_page_says_whether_a_claim_holds(plan):
    stages = plan["claims"]["stages"]
    both = {("", "sparse alone"): 0.5, ("", "dense, then sparse"): 0.6}
    assert verdict(stages, both) == "**It holds:** dense, then sparse.\n"
    assert verdict(stages, both, seeds=4) == "**Not decided.** Not run on 5 seeds: dense, then sparse.\n"
    said = verdict(stages, both | {("", "dense, then sparse"): 0.5})
    assert "**It does not hold.**" in said
    assert "- dense, then sparse: exact match to “sparse alone” +0.0 ± 0.0." in said
    noise = plan["claims"]["noise"]
    arms = {("30 % wrong", arm): 0.6 for arm in noise["of"]} | {("30 % wrong", "supervised"): 0.5}
    assert "**It holds:**" in verdict(noise, arms)
    assert "**It holds in part:**" in verdict(noise, arms | {("30 % wrong", noise["of"][0]): 0.4})


def test_preferences_hold_by_one_way_that_meets_every_condition(plan):
    claim, way = plan["claims"]["preference"], ("", "own samples, DPO, teacher")
    found = dict.fromkeys([("", arm) for arm in claim["arms"]], 0.5)
    assert "**It does not hold.**" in verdict(claim, found, teacher=0.7)
    below = verdict(claim, found | {way: 0.4}, teacher=0.7)  # as much less found as invented
    assert "own samples, DPO, teacher: things found to “before” -10.0 ± 0.0." in below
    runs = claims_verdict.by_arm(runs_of(found | {way: 0.4}, teacher=0.7))
    for seed in runs[way].values():
        seed["figures"]["object_recall"] = 0.6
    assert claims_verdict.verdict_lines(claim, runs, 5)[0] == "**It holds:** own samples, DPO, teacher."
    # a rival that does it is no preference distillation
    rival = ("", claim["rivals"][0])
    assert rival not in claims_verdict.judged(claim, runs, 5)


@pytest.mark.parametrize(
    ("condition", "bound", "met", "missed"),
    [
        ("above", 0, [0.1, 0.2], [-0.1, 0.2]),
        ("below", 0, [-0.1, -0.2], [-0.2, 0.1]),
        ("apart_from", 0, [-0.1, -0.1001], [-0.1, 0.1]),
        ("loses_at_most", 0.01, [-0.009, -0.0091], [-0.02, -0.0201]),
    ],
)
def test_conditions(condition, bound, met, missed):
    spread = 1e-4 if condition != "loses_at_most" else 1e-6
    for values, expected in ((met, True), (missed, False)):
        many = [value + spread * k for k in range(9) for value in values]
        assert claims_verdict.CONDITIONS[condition](many, bound) is expected


def test_every_condition_of_the_plan_is_known(plan):
    for claim in plan["claims"].values():
        for need in claim["needs"]:
            assert need["measure"] in claim["measures"]
            assert need["to"] in {"teacher", *claim["arms"]}
            assert len(need.keys() & claims_verdict.CONDITIONS.keys()) == 1
        assert {*claim.get("of", []), *claim.get("rivals", [])} <= claim["arms"].keys()
        assert {*claim.get("at", [])} <= claim["vary"].keys()


def test_the_figure_has_the_curves_of_what_has_run(plan, tmp_path):
    noise = plan["claims"]["noise"]
    values = {(point, arm): 0.5 + 0.1 * k for point in noise["vary"] for k, arm in enumerate(noise["arms"])}
    (tmp_path / "noise.json").write_text(json.dumps({"runs": runs_of(values)}))
    arm = "fine-tuned on the teacher's answers"
    found = claims_figure.curve(claims_figure.read(tmp_path, "noise"), arm, claims_figure.wrong_share)
    assert [x for x, *_ in found] == [0, 10, 30, 50]
    assert [mean for _, mean, *_ in found] == pytest.approx([90.2] * 4)
    assert all(low < mean < high for _, mean, low, high in found)
    claims_figure.draw(tmp_path, tmp_path / "one.png")
    with Image.open(tmp_path / "one.png") as picture:
        one = picture.size
    ways = {("", arm): 0.5 + 0.01 * k for k, arm in enumerate(plan["claims"]["preference"]["arms"])}
    (tmp_path / "preference.json").write_text(json.dumps({"runs": runs_of(ways)}))
    claims_figure.draw(tmp_path, tmp_path / "two.png")
    with Image.open(tmp_path / "two.png") as picture:
        assert picture.size == (2 * one[0], one[1])


def test_the_figure_has_no_curve_of_one_point_and_tells_what_lies_outside(plan, tmp_path, monkeypatch):
    noise = {("30 % wrong", arm): 0.5 for arm in plan["claims"]["noise"]["arms"]}
    (tmp_path / "noise.json").write_text(json.dumps({"runs": runs_of(noise)}))
    ways = {
        ("", arm): 0.5 + (0.4 if "added" in arm else 0.01 * k)
        for k, arm in enumerate(plan["claims"]["preference"]["arms"])
    }
    (tmp_path / "preference.json").write_text(json.dumps({"runs": runs_of(ways)}))
    drawn = []
    monkeypatch.setattr(claims_figure.Figure, "savefig", lambda figure, *_, **__: drawn.extend(figure.axes))
    claims_figure.draw(tmp_path, tmp_path / "claims.png")
    (axes,) = drawn
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert sorted(labels) == sorted(
        f"{arm}: outside, at +40 and +40" if "added" in arm else arm
        for arm in [*list(plan["claims"]["preference"]["arms"])[1:], "the teacher"]
    )
    assert max(axes.get_xlim()) < 20


def test_the_page_tells_a_rival_and_the_teacher_first(plan, tmp_path):
    values = {
        "before": 0.5,
        "own samples, fine-tuning on the chosen": 0.4,
        "own samples, DPO + fine-tuning, teacher": 0.3,
    }
    runs = [
        {"point": "", "arm": arm, "seed": seed, "figures": dict.fromkeys(claims_verdict.NAMES, value + 0.01 * seed),
         "teacher": dict.fromkeys(claims_verdict.NAMES, 0.45)}
        for arm, value in values.items() for seed in (0, 1)
    ]  # fmt: skip
    (tmp_path / "preference.json").write_text(json.dumps({"runs": runs, "picked": []}))
    lines = claims_page.page_lines(plan, ["preference"], tmp_path)
    said = [line for line in lines if line.startswith("“")]
    assert said == [
        "“own samples, DPO + fine-tuning, teacher” less “own samples, fine-tuning on the chosen”: hallucinated "
        "descriptions -10.0 ± 0.0, things found -10.0 ± 0.0."
    ]
    assert any(
        line.startswith("Hallucinated descriptions against “before”, below: own samples, fine") for line in lines
    )
    assert any(line.startswith("| *to its teacher* | 2 | *-14.5 ± ") for line in lines)
