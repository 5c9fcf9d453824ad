"""`llava-mod evaluate --measures mmhal`: a judge rates the answers, once each, and what it does not say is counted."""

import json

import pytest
from huggingface_hub import constants

from helpers.judges import JudgeServer, save_judge
from llava_mod_cli import main
from llava_mod_hf.commands.judge_options import JudgeArguments
from llava_mod_hf.data.scene_rows import load
from llava_mod_hf.evaluation import answer_file
from llava_mod_hf.evaluation.metrics.mmhal import PROMPT
from llava_mod_hf.publishing.checks import files_to_commit

STUDENT = "embedded:tiny-teacher"

TYPES = ("attribute", "relation", "attribute", "other")

GIVEN = ["red", "a green cat", "nothing", "two"]

VERDICTS = {"red": "Fine. Rating: 5", "a green cat": "Rating: 1", "nothing": "I would say 3.", "two": "Rating: 3"}


@pytest.fixture
def rows(tmp_path):
    scenes = load("describe", "test", 0, {"rows": len(TYPES)})
    lines = []
    for number, (row, kind) in enumerate(zip(scenes, TYPES, strict=True)):
        row["images"][0].save(tmp_path / f"{number}.png")
        asked = {"question": f"what is in picture {number}?", "answer": "a red circle", "question_type": kind}
        lines.append(json.dumps({**asked, "image": f"{number}.png", "image_content": ["Circle", "Wall"]}))
    (tmp_path / "mmhal.jsonl").write_text("\n".join(lines))
    return tmp_path / "mmhal.jsonl"


@pytest.fixture
def server(monkeypatch):
    """A judge behind an address, and a model whose answers are known."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def answers(model, processor, dataset, *, keep, **options):
        found = GIVEN[: len(dataset)]
        keep(found)
        return found

    monkeypatch.setattr(answer_file, "generate_answers", answers)
    said = lambda prompt: next(v for given, v in VERDICTS.items() if f"assistant's answer: {given}\n" in prompt)  # noqa: E731
    with JudgeServer(said) as server:
        yield server


def evaluate(rows, *more, measure="mmhal"):
    path = rows.with_name("results.json")
    argv = ["--dataset_name", str(rows), "--blind", "false", "--measures", measure, "--output_file", str(path)]
    code = main(["evaluate", "--model", STUDENT, *argv, *more])
    return json.loads(path.read_text()) if code == 0 else code


def of_server(server, *more):
    return ("--judge", "qwen", "--judge_url", server.url, *more)


def test_a_judge_rates_each_answer_once(rows, server):
    results = evaluate(rows, *of_server(server, "--judge_revision", "r1", "--judge_max_new_tokens", "99"))
    figures = {name: each["value"] for name, each in results["student"]["measures"]["mmhal"].items()}
    assert figures == {
        "score": 3,
        "hallucination_rate": 1 / 3,
        "unread_verdicts": 1 / 4,
        "attribute/score": 5,
        "relation/score": 1,
        "other/score": 3,
    }
    prompts = [body["messages"][0]["content"] for body in server.asked]
    filled = [("Circle, Wall", f"what is in picture {n}?", "a red circle", given) for n, given in enumerate(GIVEN)]
    assert prompts == [PROMPT.format(*each) for each in filled]
    assert {body["max_tokens"] for body in server.asked} == {99}
    judge = results["setup"]["judge"]
    assert (judge["name"], judge["revision"], judge["url"]) == ("qwen", "r1", server.url)
    again = evaluate(rows, *of_server(server, "--judge_revision", "r1", "--judge_max_new_tokens", "99"))
    assert again["student"]["measures"] == results["student"]["measures"] and len(server.asked) == 4
    assert evaluate(rows, *of_server(server, "--judge_revision", "r2")) and len(server.asked) == 8
    kept = [json.loads(line) for line in rows.with_name("results.verdicts.jsonl").read_text().splitlines()]
    assert [each["verdict"] for each in kept] == [VERDICTS[given] for given in GIVEN] * 2
    assert not any("verdicts" in file.name for file in files_to_commit(rows.parent))


def test_a_prompt_of_ones_own_takes_the_place_of_ours(rows, server, tmp_path):
    (tmp_path / "prompt.txt").write_text("{} | {} | {} | assistant's answer: {}\n")
    results = evaluate(rows, *of_server(server, "--judge_prompt", str(tmp_path / "prompt.txt")))
    first = "Circle, Wall | what is in picture 0? | a red circle | assistant's answer: red\n"
    assert server.asked[0]["messages"][0]["content"] == first
    assert results["student"]["measures"]["mmhal"]["score"]["value"] == 3
    assert len(results["setup"]["judge"]["prompt"]) == 16


def test_a_server_that_stops_leaves_the_verdicts_so_far(rows, server, capsys):
    say, asked = server.say, []

    def tired(prompt):
        asked.append(prompt)
        return say(prompt) if len(asked) < 3 else 1 / 0

    server.say = tired
    assert evaluate(rows, *of_server(server)) != 0
    assert "gave no verdict" in capsys.readouterr().err
    server.say = say
    before = len(server.asked)
    assert evaluate(rows, *of_server(server))["student"]["measures"]["mmhal"]["score"]["value"] == 3
    assert len(server.asked) == before + 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "`measures` name `mmhal`, which asks a judge, and none is named: give `judge`"),
        (["--judge_url", "http://x/v1"], "`judge_url` is `http://x/v1`, and no `judge` is named"),
        (["--judge", "j", "--judge_url", "http://x/v1", "--judge_batch_size", "2"], "which is asked one by one"),
        (["--judge", "j", "--judge_max_new_tokens", "0"], "`judge_max_new_tokens` is 0: give at least 1"),
        (["--judge", "j", "--judge_prompt", "gone.txt"], "`judge_prompt` is `gone.txt`, and no such file is there"),
        (["--judge", "someone/judge"], "give `judge_revision`, a commit"),
    ],
)
def test_a_judge_that_cannot_be_is_refused_before_any_answer(rows, monkeypatch, capsys, more, message):
    monkeypatch.setattr(answer_file, "generate_answers", None)
    assert evaluate(rows, *more) == 2
    assert message in capsys.readouterr().err
    assert evaluate(rows, "--judge", "j", measure="anls") == 2
    assert "`judge` is `j`, which does nothing without a measure of mmhal" in capsys.readouterr().err


def test_a_local_judge_that_rates_nothing_is_said_to(rows, tokenizer, tmp_path):
    folder = save_judge(tokenizer, tmp_path / "judge")
    options = (
        "--judge",
        str(folder),
        "--judge_batch_size",
        "3",
        "--judge_max_new_tokens",
        "4",
        "--max_new_tokens",
        "3",
    )
    results = evaluate(rows, *options)
    figures = {name: each["value"] for name, each in results["student"]["measures"]["mmhal"].items()}
    assert figures["unread_verdicts"] == 1 and figures["score"] is None and figures["hallucination_rate"] is None
    kept = [json.loads(line)["verdict"] for line in rows.with_name("results.verdicts.jsonl").read_text().splitlines()]
    assert len(kept) == len(TYPES) and any(kept)
    made = JudgeArguments(judge=str(folder), judge_batch_size=3).make(["mmhal"], tmp_path / "r.json", "cpu")
    assert (made.judge.batch_size, made.judge.device, made.judge.max_new_tokens) == (3, "cpu", 1024)
