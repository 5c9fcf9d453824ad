"""The benchmarks' measures of rows: which columns they read, their intervals, and how options are asked."""

import random
import re
from pathlib import Path

import pytest
from datasets import Dataset

from llava_mod_hf.data.scene_rows import load
from llava_mod_hf.data.scenes import KINDS, caption
from llava_mod_hf.evaluation import benchmarks
from llava_mod_hf.evaluation.benchmarks import BENCHMARKS, Benchmark, check_names, measure, register_benchmark, units
from llava_mod_hf.evaluation.metrics.exact_match import ExactMatch
from llava_mod_hf.evaluation.metrics.synonyms import Synonyms
from llava_mod_hf.evaluation.questions import row_texts
from llava_mod_hf.evaluation.rotations import rotate, with_suffix


def row(answer, **more):
    return {"question": "what?", "answer": answer, "kind": "", **more}


def value(name, rows, given, **options):
    found = measure([name], rows, given, synonyms=options.pop("synonyms", None))[name]
    return {figure: each["value"] for figure, each in found.items()}


def test_answers_are_texts_or_as_vqa_has_them():
    ten = [{"answer": "red", "answer_id": n, "answer_confidence": "yes"} for n in range(10)]
    rows = [row("blue", answers=ten), row("blue", answers=["red"] * 10), row("blue", answers=["blue"] * 10)]
    assert value("vqa_accuracy", rows, ["red"] * 3) == {"vqa_accuracy": pytest.approx(2 / 3)}
    for name in ("exact_match", "relaxed_match", "anls"):
        assert value(name, [*rows, row("red")], ["red"] * 4) == {name: 3 / 4}


def test_objects_and_captions_say_what_is_there(tmp_path):
    (tmp_path / "list.txt").write_text("person, man\ndog, puppy\ncat\n")
    rows = [row("a cat", objects=["dog"], captions=["a man"]), row("a cat", objects=[]), row("a cat")]
    found = value("chair", rows, ["a dog, a man"] * 3, synonyms=Synonyms.read(tmp_path / "list.txt"))
    assert found == {"chair_s": 2 / 3, "chair_i": 4 / 6, "object_recall": 2 / 4}


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("vqa_accuracy", [row("red")], "Row 0 has no `answers`, which the measure `vqa_accuracy` reads"),
        ("multiple_choice", [row("A")], "Row 0 has no `options`"),
        ("exact_match", [row("a"), row("b", answers=[1])], r"Row 1 gives the measure `exact_match` \[1\]"),
        ("pope", [row("yes", category="color")], "None of 1 rows is of the measure `pope`"),
        ("chair", [row("yes")], "None of 1 rows is of the measure `chair`"),
    ],
)
def test_rows_without_what_a_measure_reads_are_refused(name, rows, message):
    with pytest.raises(ValueError, match=message):
        units(name, rows, ["x"] * len(rows), synonyms=None)


def test_names_that_cannot_be_measured_together_are_refused():
    check_names([name for name in BENCHMARKS if name != "multiple_choice"])
    check_names(["multiple_choice"])
    with pytest.raises(ValueError, match="names `bleu`, which there is not: give some of exact_match, "):
        check_names(["anls", "bleu"])
    with pytest.raises(ValueError, match="names `anls` twice"):
        check_names(["anls", "pope", "anls"])
    with pytest.raises(ValueError, match="`multiple_choice` asks the questions in a way of its own"):
        check_names(["anls", "multiple_choice"])


def test_a_measure_of_ones_own(monkeypatch):
    class Brief(ExactMatch):
        def count(self, prediction, references):
            return {"brief": (len(prediction) < 4, 1)}

    monkeypatch.setattr(benchmarks, "BENCHMARKS", dict(BENCHMARKS))
    register_benchmark("brief", Benchmark(Brief, lambda row: ([row["answer"]],)))
    check_names(["brief"])
    assert value("brief", [row("a")] * 2, ["yes", "certainly"]) == {"brief": 0.5}
    with pytest.raises(ValueError, match="There is a measure `brief` already"):
        register_benchmark("brief", Benchmark(Brief, lambda row: (row["answer"],)))


@pytest.fixture(scope="module")
def scenes():
    rows = load("mixture", "test", 3, {"rows": 200}).remove_columns("images").to_list()
    rng = random.Random(1)

    def answer(row):
        if rng.random() < 0.3:
            return row["answer"]
        if row["kind"] == "describe":
            return caption([rng.choice(KINDS) for _ in range(rng.randint(1, 4))])
        return rng.choice(["Yes, there is.", "No, there is none.", "I think not", "no"])

    return rows, [answer(row) for row in rows]


def test_pope_and_chair_equal_a_plain_count(scenes):
    rows, given = scenes
    asked = [
        (said, row["answer"], row["kind"][10:-1])
        for row, said in zip(rows, given, strict=True)
        if row["kind"].startswith("presence")
    ]
    assert len(asked) > 40
    # the conversations' last turns and the others are no questions of presence
    found = value("pope", [row for row in rows if row["kind"].startswith("presence")], [each[0] for each in asked])
    for prefix, pairs in [("", asked)] + [
        (f"{sort}/", [each for each in asked if each[2] == sort]) for sort in ("random", "popular", "adversarial")
    ]:
        claims = [said.lower().startswith("yes") for said, _, _ in pairs]
        there = [right == "yes" for _, right, _ in pairs]
        hits = sum(claim and present for claim, present in zip(claims, there, strict=True))
        same = sum(claim == present for claim, present in zip(claims, there, strict=True))
        assert found[f"{prefix}accuracy"] == pytest.approx(same / len(pairs))
        assert found[f"{prefix}precision"] == pytest.approx(hits / sum(claims))
        assert found[f"{prefix}recall"] == pytest.approx(hits / sum(there))
        assert found[f"{prefix}f1"] == pytest.approx(2 * hits / (sum(claims) + sum(there)))
        assert found[f"{prefix}yes"] == pytest.approx(sum(claims) / len(pairs))

    told = [
        ([k for k in said.lower().replace("a ", "").replace(" and", ",").split(", ") if k in KINDS],
         {k for k in KINDS if k in row["answer"]})
        for row, said in zip(rows, given, strict=True) if row["kind"] == "describe"
    ]  # fmt: skip
    assert len(told) > 40
    described = [(row, said) for row, said in zip(rows, given, strict=True) if row["kind"] == "describe"]
    found = value("chair", *map(list, zip(*described, strict=True)))
    absent = [[kind for kind in named if kind not in there] for named, there in told]
    assert found["chair_s"] == pytest.approx(sum(map(bool, absent)) / len(told))
    assert found["chair_i"] == pytest.approx(sum(map(len, absent)) / sum(len(named) for named, _ in told))
    present = sum(len(there) for _, there in told)
    assert found["object_recall"] == pytest.approx(sum(len(there & set(named)) for named, there in told) / present)


def test_intervals_and_a_paired_difference():
    rng = random.Random(0)
    rows = [row("yes")] * 400
    given = [rng.choice(["yes", "yes", "yes", "no"]) for _ in rows]
    found = measure(["exact_match"], rows, given)["exact_match"]["exact_match"]
    share = given.count("yes") / 400
    assert found["value"] == share and found["low"] < share < found["high"]
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * (share * (1 - share) / 400) ** 0.5, rel=0.15)

    worse = ["no" if place < 40 else said for place, said in enumerate(given)]
    apart = measure(["exact_match"], rows, given, worse)["exact_match"]["exact_match"]
    assert apart["difference"] == pytest.approx(given[:40].count("yes") / 400)
    assert apart["low"] > 0 and apart["p"] < 0.01
    same = measure(["exact_match"], rows, given, given)["exact_match"]["exact_match"]
    assert same == {"difference": 0, "low": 0, "high": 0, "p": 1}


def test_p_is_that_of_the_sign_test():
    """Of 8 questions on which the two differ one wins 7: two-sided 2 · (1 + 8) / 2⁸."""
    rows = [row("yes")] * 60
    own = ["yes"] * 59 + ["no"]
    other = ["no"] * 7 + ["yes"] * 53
    found = measure(["exact_match"], rows, own, other)["exact_match"]["exact_match"]
    assert found["p"] == pytest.approx(18 / 256, abs=0.02)


def test_what_nothing_counts_has_no_value():
    rows = [row("no", category="random")] * 3
    found = measure(["pope"], rows, ["no"] * 3)["pope"]
    assert found["precision"] == {"value": None, "low": None, "high": None}
    assert found["accuracy"] == {"value": 1, "low": 1, "high": 1}
    assert measure(["pope"], rows, ["no"] * 3, ["yes"] * 3)["pope"]["precision"]["p"] is None


def choices(*rows):
    texts = [{"images": [], "prompt": [{"role": "user", "content": "which?"}], **each} for each in rows]
    return Dataset.from_list(
        [{"completion": [{"role": "assistant", "content": each["answer"]}], "question": "which?", "kind": "", **each}
         for each in texts]
    )  # fmt: skip


def rotated(*rows):
    rows = choices(*rows)
    return rotate(rows, row_texts(rows))


@pytest.mark.parametrize(
    "row",
    [
        {"answer": "B", "A": "cat", "B": "dog", "C": "cow", "D": None},
        {"answer": "dog", "options": ["cat", "dog", "cow"]},
        {"answer": "b", "choices": ["cat", "dog", "cow"]},
    ],
)
def test_each_rotation_is_asked(row):
    asked, texts = rotated(row)
    assert [each[0]["content"] for each in asked["prompt"]] == [
        "which?\nA. cat\nB. dog\nC. cow",
        "which?\nA. dog\nB. cow\nC. cat",
        "which?\nA. cow\nB. cat\nC. dog",
    ]
    assert list(asked["answer"]) == [each[0]["content"] for each in asked["completion"]] == ["B", "A", "C"]
    assert [each["group"] for each in texts] == [0, 0, 0]
    given = ["dog", "dog", "dog"]
    assert value("multiple_choice", texts, given)["circular_accuracy"] == 1
    assert value("multiple_choice", texts, ["B"] * 3) == {
        "circular_accuracy": 0, "plain_accuracy": 1, "unread_choices": 0,
    }  # fmt: skip


def test_a_bootstrap_draws_questions_not_rotations():
    _, rows = rotated(*[{"answer": "A", "options": ["x", "y"]}] * 50)
    given = [row["answer"] if row["group"] % 2 else "neither" for row in rows]
    found = measure(["multiple_choice"], rows, given)["multiple_choice"]["unread_choices"]
    # of 50 questions, as if each were one row
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * (0.25 / 50) ** 0.5, rel=0.2)


def test_a_hint_stands_first_and_pictures_stay():
    part = [{"type": "image", "text": None}, {"type": "text", "text": "which?"}]
    asked = {"prompt": [{"role": "user", "content": part}], "hint": "Look."}
    rows, _ = rotated({"answer": "A", "options": ["x", "y"], **asked})
    rows = with_suffix(rows, "Answer with a letter.")
    content = rows[1]["prompt"][0]["content"]
    assert [each["type"] for each in content] == ["image", "text"]
    assert content[1]["text"] == "Look.\nwhich?\nA. y\nB. x\nAnswer with a letter."


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": "A"}, "Row 0 has 0 options: give 2 to 26"),
        ({"answer": "A", "options": ["x"]}, "Row 0 has 1 options"),
        ({"answer": "C", "options": ["x", "y"]}, "Row 0 has the answer 'C', and 0 of its options"),
        ({"answer": "x", "options": ["x", "x"]}, "and 2 of its options"),
        ({"answer": "A", "options": "x, y"}, "has the options 'x, y': give a list of texts"),
    ],
)
def test_rows_without_options_are_refused(row, message):
    with pytest.raises(ValueError, match=message):
        rotated(row)


def test_a_suffix_ends_the_question_alone():
    turns = [
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "which?"},
    ]
    rows = with_suffix(choices({"answer": "A", "prompt": turns}), "Briefly.")
    assert [turn["content"] for turn in rows[0]["prompt"]] == ["first", "yes", "which?\nBriefly."]
    assert rows[0]["question"] == "which?"


def test_the_page_runs_and_names_every_measure():
    page = (Path(__file__).parents[2] / "docs" / "judging.md").read_text()
    table = page.split("## The measures")[1].split("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE) == list(BENCHMARKS)
    (example,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    names = {}
    exec(example, names)
    assert str(names["found"]["relaxed_match"]["relaxed_match"]) == re.search(r"# (\{.*\})", example)[1]
