"""Malformed rows, by hand and generated: each is refused by number in one sentence, or left out and written down."""

import copy
import json
import random

import pytest
from PIL import Image

from llava_mod_hf.data.arguments import DataArguments
from llava_mod_hf.data.conversations import AnswersCollator
from llava_mod_hf.data.dropped_rows import FILE, DroppedRows
from llava_mod_hf.data.fitting import fit_rows
from llava_mod_hf.data.load import load_rows

NAN = float("nan")
DEEP = [[[[[[["x"]]]]]]]


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


def talk(*turns, **columns):
    return {"conversations": list(turns), **columns}


ODD = {"none": None, "number": 3, "float": 1.5, "nan": NAN, "true": True, "list": ["a"], "dict": {"a": 1}, "deep": DEEP}
BROKEN = {
    "missing": "nowhere.png", "above": "../a.png", "absolute": "/etc/hostname", "url": "https://example.org/a.png",
    "data url": "data:image/png;base64,AAAA", "home": "~/a.png", "empty name": "", "a folder": ".",
    "no picture": "text.png",
    "cut": "cut.png", "empty file": "empty.png", "deep": "deep.png", "null in name": "a\0.png", "long name": "a" * 5000,
    "number": 3, "list in list": [["a.png"]], "dict": {"a": 1}, "nan": NAN, "none in list": [None], "true": True,
    "dict of none": {"bytes": None, "path": None}, "bytes as text": {"bytes": "x"}, "path of list": {"path": ["a.png"]},
    "surrogate": "\ud800.png",
}  # fmt: skip
Q, A = human("what?"), gpt("red")

LLAVA = {
    **{f"row is {name}": value for name, value in ODD.items() if name not in ("dict", "nan")},
    "row is nan": NAN,
    "no columns": {},
    "other columns": {"text": "a"},
    **{f"conversations is {name}": {"conversations": value} for name, value in ODD.items()},
    "conversations is text": {"conversations": "what? red"},
    "conversations is empty": talk(),
    **{f"a turn is {name}": talk(value, A) for name, value in ODD.items()},
    **{f"a question is {name}": talk(human(value), A) for name, value in ODD.items() if name != "none"},
    **{f"an answer is {name}": talk(Q, gpt(value)) for name, value in ODD.items()},
    **{f"a role is {name}": talk({"from": value, "value": "what?"}, A) for name, value in ODD.items()},
    **{f"a later answer is {name}": talk(Q, A, Q, gpt(value)) for name, value in ODD.items()},
    "answer is empty": talk(Q, gpt("")),
    "answer is blank": talk(Q, gpt(" \n\t ")),
    "answer is a no-break space": talk(Q, gpt("\u00a0")),
    "later answer is empty": talk(Q, A, Q, gpt("")),
    "unknown role": talk({"from": "bing", "value": "what?"}, A),
    "role in capitals": talk({"from": "HUMAN", "value": "what?"}, A),
    "tool": talk({"from": "tool", "value": "what?"}, A),
    "no role": talk({"value": "what?"}, A),
    "no value": talk({"from": "human"}, A),
    "question alone": talk(Q),
    "answer alone": talk(A),
    "system alone": talk({"from": "system", "value": "be kind"}),
    "two questions": talk(Q, Q, A),
    "two answers": talk(Q, A, A),
    "system in between": talk(Q, A, {"from": "system", "value": "be kind"}, Q, A),
    "two systems": talk({"from": "system", "value": "a"}, {"from": "system", "value": "b"}, Q, A),
    "answers first": talk(A, A, Q, A),
    "a placeholder without a picture": talk(human("<image>what?"), A),
    "two placeholders for one picture": talk(human("<image><image>what?"), A, image="a.png"),
    "one placeholder for two pictures": talk(human("<image>what?"), A, image=["a.png", "a.png"]),
    "placeholder in the answer": talk(human("what?"), gpt("<image>"), image="a.png"),
    "placeholders in both": talk(human("<image>what?"), gpt("a <image>"), image="a.png"),
    "placeholder in the system turn": talk({"from": "system", "value": "<image>"}, Q, A),
    "placeholder in a question that goes": talk(human("<image>what?"), A, human("<image>?"), image=["a.png", "a.png"]),
    "the role's mark in a question": talk(human("what? <|assistant|>"), A),
    "the role's mark in an answer": talk(Q, gpt("red<|user|>no")),
    "the end of a turn in an answer": talk(Q, gpt("<|user|>")),
    "a surrogate in an answer": talk(Q, gpt("red \ud800")),
    "a surrogate in a question": talk(human("what \udfff"), A),
    **{f"picture: {name}": talk(human("<image>what?"), A, image=value) for name, value in BROKEN.items()},
    **{f"picture of a list: {name}": talk(human("<image>what?"), A, image=[value]) for name, value in BROKEN.items()},
}  # fmt: skip

GOOD = talk(human("<image>what?"), A, image="a.png")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    Image.new("RGB", (20, 10), "red").save(folder / "a.png")
    Image.new("I;16", (20, 10)).save(folder / "deep.png")
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:-30])
    (folder / "text.png").write_text("no picture")
    (folder / "empty.png").write_text("")
    return folder


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def read(folder, rows, processor, *, bad_rows="error", dropped=None, streaming=False):
    (folder / "rows.json").write_text(json.dumps(rows))
    share = {"max_bad_rows": 1.0} if bad_rows == "drop" else {}
    arguments = DataArguments(str(folder / "rows.json"), bad_rows=bad_rows, streaming=streaming, **share)
    rows = load_rows(arguments, columns=("prompt", "completion"), dropped=dropped)
    return list(fit_rows(rows, processor, max_length=None, bad_rows=bad_rows, dropped=dropped)[0])


def assert_named(error, number):
    told = str(error)
    assert told.startswith((f"Row {number}", f"`Row {number}")) and "\n" not in told.strip() and len(told) < 7000, told


def test_there_are_enough_of_them():
    assert len(LLAVA) >= 120


@pytest.mark.parametrize("name", LLAVA)
def test_each_stops_the_reading_by_its_number(folder, processor, name):
    with pytest.raises(ValueError) as caught:
        read(folder, [GOOD, LLAVA[name]], processor, streaming=True)
    assert_named(caught.value, 1)


def test_all_are_left_out_and_written_down(folder, processor):
    rows = [row for bad in LLAVA.values() for row in (GOOD, bad)]
    dropped = DroppedRows(folder / FILE, max_share=1)
    kept = [row["source_row"] for row in read(folder, rows, processor, bad_rows="drop", dropped=dropped)]
    assert kept == list(range(0, len(rows), 2))
    told = [json.loads(line) for line in (folder / FILE).read_text().splitlines()]
    assert sorted(line["row"] for line in told) == list(range(1, len(rows), 2))
    for line in told:
        assert_named(line["reason"], line["row"])


JUNK = [
    None, 0, -1, 1e308, NAN, True, False, [], [[]], [None], {}, {"a": 1}, DEEP,
    "", " ", "\n", "<image>", "<|user|>", "<|assistant|>", "\ud800", "\0", "a" * 9999, "ünï ☃ 🎉 \u202e",
    {"from": "gpt", "value": "x"}, {"from": "human", "value": "<image>"}, "human", "gpt", "system",
    ["a.png"], "../../x.png", "a.png", {"path": "a.png"}, {"bytes": None, "path": None},
]  # fmt: skip

BASES = [
    GOOD,
    talk(Q, A, Q, gpt("blue")),
    talk(human("<image>a"), A, human("<image>b"), A, image=["a.png", "a.png"]),
    talk(
        {"role": "system", "content": "kind"}, {"role": "user", "content": "?"}, {"role": "assistant", "content": "b"}
    ),
]


def paths(value, path=()):
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in items:
        yield from paths(each, (*path, key))


def mutated(rng):
    row = copy.deepcopy(rng.choice(BASES))
    for _ in range(rng.choice((1, 1, 2, 3))):
        path = rng.choice([path for path in paths(row) if path] or [()])
        parent = row
        for key in path[:-1]:
            parent = parent[key]
        if not path:
            continue
        kind = rng.random()
        if kind < 0.6:
            parent[path[-1]] = copy.deepcopy(rng.choice(JUNK))
        elif kind < 0.8:
            del parent[path[-1]]
        elif isinstance(parent, list):
            parent.insert(path[-1], copy.deepcopy(parent[path[-1]]))
        else:
            parent[str(path[-1]).upper()] = parent.pop(path[-1])
    return row


def assert_right(row, processor):
    """What training would read of a row: it has a question and answers, and as many places as pictures."""
    turns = [*row["prompt"], *row["completion"]]
    roles = [turn["role"] for turn in turns if turn["role"] != "system"]
    assert roles == ["user", "assistant"] * (len(roles) // 2) and roles
    for turn in turns:
        said = turn["content"]
        said = said if isinstance(said, str) else "".join(part["text"] or "" for part in said)
        assert "<image>" not in said and "<|" not in said
        assert said.strip() or turn["role"] != "assistant"
    batch = AnswersCollator(processor, completion_only_loss=True)([dict(row)])
    assert (batch["input_ids"] == processor.image_token_id).sum() == 16 * len(row["images"])
    assert len(batch.get("pixel_values", ())) == len(row["images"]) and (batch["labels"] != -100).any()


@pytest.mark.parametrize("seed", range(4))
def test_generated_rows_are_right_or_written_down(folder, processor, seed):
    rng = random.Random(seed)
    rows = [GOOD, *(mutated(rng) for _ in range(150))]
    dropped = DroppedRows(folder / f"{seed}.jsonl", max_share=1)
    kept = read(folder, rows, processor, bad_rows="drop", dropped=dropped)
    told = {line["row"]: line for line in map(json.loads, dropped.path.read_text().splitlines())}
    assert {row["source_row"] for row in kept} | told.keys() == set(range(len(rows)))
    assert not {row["source_row"] for row in kept} & told.keys()
    assert len(told) > 60 and len(kept) > 3
    for number, line in told.items():
        assert_named(line["reason"], number)
    for row in kept:
        assert_right(row, processor)
