"""The published layouts: LLaVA's conversations and RLAIF-V's pairs, as rows of TRL or one sentence with the number."""

import json

import pytest
from datasets import Dataset

from llava_mod_hf.data import json_rows as json_file
from llava_mod_hf.data.formats import FORMATS, read_row, recognise, register_format
from llava_mod_hf.data.json_rows import json_rows
from llava_mod_hf.data.load import DataArguments, load_rows


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def image(path):
    return {"bytes": None, "path": path}


def llava(*turns, **columns):
    return {"conversations": list(turns), **columns}


@pytest.mark.parametrize(
    ("columns", "layout"),
    [
        (["id", "image", "conversations"], "LLaVA"),
        (["ds_name", "image", "question", "chosen", "rejected", "origin_dataset", "idx", "image_path"], "RLAIF-V"),
        (["images", "prompt", "chosen", "rejected", "question"], "preference"),
        (["images", "prompt", "completion", "question", "answer"], "prompt-completion"),
        (["messages", "images"], "messages"),
        (["images", "prompt"], "prompt"),
        (["image", "question", "answers", "answer"], "question-answer"),
        (["image", "question", "answers", "question_id"], "question-answers"),
    ],
)
def test_the_format_is_told_by_the_columns(columns, layout):
    assert recognise(columns, "rows.json") == layout


def test_an_unknown_format_is_refused_with_the_known_ones():
    with pytest.raises(
        ValueError, match=r"`rows.json` has the columns \['image', 'caption'\], .* LLaVA \(conversations\)"
    ):
        recognise(["image", "caption"], "rows.json")


def test_a_caption_with_the_placeholder_before_or_behind():
    for text in ("<image>\nWrite a caption.", "Write a caption.\n<image>"):
        row = llava(human(text), gpt("A cat."), id="004", image="00/004.jpg")
        assert read_row(row, "LLaVA", "Row 0") == [
            {"images": [image("00/004.jpg")], "prompt": [user("Write a caption.")], "completion": [assistant("A cat.")]}
        ]


@pytest.mark.parametrize(
    "answers", [["red", "blue", "blue", "red"], [{"answer": "red", "answer_id": 1}, {"answer": "blue", "answer_id": 2}]]
)
def test_of_several_annotators_the_first_of_the_most_frequent_answers_is_taken(answers):
    row = {"question": "which?", "answers": answers, "image": "a.jpg"}
    assert read_row(row, "question-answers", "Row 0") == [
        {"images": [image("a.jpg")], "prompt": [user("which?")], "completion": [assistant("red")]}
    ]
    assert read_row({**row, "answers": answers[1:]}, "question-answers", "Row 0")[0]["completion"] == [
        assistant("blue")
    ]


@pytest.mark.parametrize("answers", [None, [], "red", [1], [{"text": "red"}]])
def test_answers_that_are_none_are_refused(answers):
    with pytest.raises(ValueError, match="Row 3: `answers` must be a list of texts"):
        read_row({"question": "which?", "answers": answers}, "question-answers", "Row 3")


def test_several_turns_are_one_row_or_one_for_each_answer():
    row = llava(human("<image>\nWhat is it?"), gpt("A cat."), human("And its colour?"), gpt("Grey."), image="a.jpg")
    whole = [user("What is it?"), assistant("A cat."), user("And its colour?"), assistant("Grey.")]
    assert read_row(row, "LLaVA", "Row 0", multi_turn="expand") == [
        {"images": [image("a.jpg")], "prompt": whole[:1], "completion": whole[1:2]},
        {"images": [image("a.jpg")], "prompt": whole[:3], "completion": whole[3:]},
    ]
    assert read_row(row, "LLaVA", "Row 0") == [
        {"images": [image("a.jpg")], "prompt": whole[:1], "completion": whole[1:]}
    ]
    greeted = {"messages": [assistant("Hi."), *whole, user("And?")]}  # a first turn is nobody's answer
    assert read_row(greeted, "messages", "Row 0") == [
        {"images": [], "prompt": [assistant("Hi."), whole[0]], "completion": whole[1:]}
    ]
    with pytest.raises(ValueError, match="Row 0 has no question"):
        read_row({"messages": whole[1:2]}, "messages", "Row 0", multi_turn="expand")


def test_text_only_a_system_turn_several_images_and_turns_that_nobody_asked_for():
    [row] = read_row(llava({"from": "system", "value": "Be kind."}, human("Hello?"), gpt("Hi.")), "LLaVA", "Row 0")
    assert row == {
        "images": [],
        "prompt": [{"role": "system", "content": "Be kind."}, user("Hello?")],
        "completion": [assistant("Hi.")],
    }
    row = llava(gpt("First."), human("<image><image> differ?"), gpt("Yes."), human("Why?"), image=["a.jpg", "b.jpg"])
    assert read_row(row, "LLaVA", "Row 0") == [
        {
            "images": [image("a.jpg"), image("b.jpg")],
            "prompt": [user("differ?")],
            "completion": [assistant("Yes.")],
        }
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (llava(human("<image> What?"), gpt("A cat.")), r"Row 7 has 0 images and 1 `<image>`"),
        (llava(human("<image><image> What?"), gpt("A cat."), image="a.jpg"), r"Row 7 has 1 images and 2 `<image>`"),
        (
            llava(human("What?"), gpt("It."), human("<image> this?"), gpt("No."), image=["a"] * 2),
            "2 images and 1 `<image>` in its turns, 0",
        ),
        (llava(human("What?"), gpt("It: <image>"), image="a"), "1 `<image>` in its turns, 1 of them in answers"),
        (llava(human("What?"), gpt("")), "Row 7: an answer is empty"),
        (llava(human("What?"), gpt(None)), "Row 7: an answer is empty"),
        (llava(human("What?")), "Row 7: a conversation must take turns"),
        (llava(human("What?"), human("Now?"), gpt("Yes.")), "Row 7: a conversation must take turns"),
        (llava(), "Row 7: a conversation must take turns"),
        (
            llava({"from": "bing", "value": "x"}),
            "Row 7: a turn is from `bing`: it may be from system, human, user, gpt, assistant",
        ),
        (llava({"value": "x"}), "Row 7: `conversations` must be a list"),
        ({"conversations": None}, "Row 7: `conversations` must be a list"),
        (llava(human("What?"), gpt("It."), image=3), "Row 7: an image is neither a path nor bytes"),
    ],
)
def test_malformed_conversations_are_named(row, message):
    with pytest.raises(ValueError, match=message):
        read_row(row, "LLaVA", "Row 7")


def shown(text, *images):
    return [*({"type": "image", "text": None} for _ in images), {"type": "text", "text": text}]


def test_pictures_of_later_questions_stay_with_them():
    said = [human("Hello?"), gpt("Hi."), human("<image>\nand <image> differ?"), gpt("Yes."), human("<image> this?")]
    row = llava(*said, gpt("No."), image=["a.jpg", "b.jpg", "c.jpg"])
    images = [image(f"{name}.jpg") for name in "abc"]
    turns = [
        user(shown("Hello?")),
        assistant("Hi."),
        user(shown("and  differ?", 1, 2)),
        assistant("Yes."),
        user(shown("this?", 3)),
        assistant("No."),
    ]
    assert read_row(row, "LLaVA", "Row 0") == [{"images": images, "prompt": turns[:1], "completion": turns[1:]}]
    assert read_row(row, "LLaVA", "Row 0", multi_turn="expand") == [
        {"images": images[:count], "prompt": turns[:end], "completion": turns[end : end + 1]}
        for end, count in ((1, 0), (3, 2), (5, 3))
    ]


def test_turns_by_other_names_are_the_same_ones():
    expected = read_row(
        llava(human("What?"), gpt("It."), human("<image>This?"), gpt("No."), image="a"), "LLaVA", "Row 0"
    )
    for keys in (("from", "value"), ("role", "content")):
        for roles in (("human", "gpt"), ("user", "assistant"), ("human", "assistant")):
            said = [
                dict(zip(keys, (roles[i % 2], text), strict=True))
                for i, text in enumerate(("What?", "It.", "<image>This?", "No."))
            ]
            assert read_row(llava(*said, image="a"), "LLaVA", "Row 0") == expected
    # as `datasets` reads a file of both
    both = [{"from": None, "value": None, **user("What?")}, {**gpt("It."), "role": None, "content": None}]
    assert read_row(llava(*both), "LLaVA", "Row 0")[0]["completion"] == [assistant("It.")]


PAIR = {"prompt": [user("What?")], "chosen": [assistant("A cat.")], "rejected": [assistant("A dog.")]}


@pytest.mark.parametrize(
    ("layout", "row"),
    [
        ("preference", {"prompt": "<image>What?", "chosen": [gpt("A cat.")], "rejected": [gpt("A dog.")]}),
        ("preference", {"prompt": [human("<image>\nWhat?")], "chosen": gpt("A cat."), "rejected": gpt("A dog.")}),
        ("preference", {"prompt": [user("What?")], "chosen": "A cat.", "rejected": assistant("A dog.")}),
        ("RLAIF-V", {"question": "What?", "chosen": [gpt("A cat.")], "rejected": [assistant("A dog.")]}),
        ("LLaVA pairs", {"conversations": [human("<image>What?")], "chosen": gpt("A cat."), "rejected": gpt("A dog.")}),
    ],
)
def test_pairs_whose_answers_are_turns(layout, row):
    assert recognise(["image", *row], "rows.json") == layout
    assert read_row({"image": "a.jpg", **row}, layout, "Row 0") == [{"images": [image("a.jpg")], **PAIR}]


def test_a_pair_in_texts_alone_stays_so_and_a_question_is_no_answer():
    texts = {"prompt": "<image>What?", "chosen": "A cat.", "rejected": "A dog."}
    assert read_row({"image": "a.jpg", **texts}, "preference", "Row 0") == [{"images": [image("a.jpg")], **texts}]
    row = {"image": "a.jpg", **PAIR, "chosen": [human("What?"), gpt("A cat.")]}
    with pytest.raises(ValueError, match="Row 0: `chosen` begins with a question: questions belong into the prompt"):
        read_row(row, "preference", "Row 0")


def test_a_pair_with_its_image_inside_or_by_path():
    answers = {"question": "What is it?", "chosen": "A cat.", "rejected": "A dog."}
    expected = {
        "prompt": [user("What is it?")],
        "chosen": [assistant("A cat.")],
        "rejected": [assistant("A dog.")],
    }
    for given, found in (
        ({"image": {"bytes": b"png", "path": "x.png"}, "image_path": "y.png"}, {"bytes": b"png", "path": "x.png"}),
        ({"image": "a.jpg"}, image("a.jpg")),
        ({"image_path": "a.jpg"}, image("a.jpg")),
        ({"image": b"png"}, {"bytes": b"png", "path": None}),
    ):
        assert read_row({**answers, **given}, "RLAIF-V", "Row 0") == [{"images": [found], **expected}]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen": ""}, "Row 3 has no `chosen` answer"),
        ({"rejected": None}, "Row 3 has no `rejected` answer"),
        ({"rejected": "  "}, "Row 3, `rejected`: an answer is empty"),
        ({"question": None}, "Row 3 has no question"),
    ],
)
def test_malformed_pairs_are_named(change, message):
    row = {"image": "a.jpg", "question": "What?", "chosen": "A cat.", "rejected": "A dog.", **change}
    with pytest.raises(ValueError, match=message):
        read_row(row, "RLAIF-V", "Row 3")


def test_images_that_differ_between_the_answers_are_refused():
    part = [{"type": "image"}, {"type": "text", "text": "A cat."}]
    row = {"images": [], "prompt": [user("What?")], "chosen": [assistant(part)], "rejected": [assistant("A dog.")]}
    with pytest.raises(ValueError, match="Row 3: `chosen` has 1 images of its own and `rejected` 0"):
        read_row(row, "preference", "Row 3")


ROWS = [{"id": 1, "a": "x, [y]"}, {"id": "two", "a": {"b": [1, 2]}}, {"id": None, "a": "ä" * 50}]


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
@pytest.mark.parametrize("form", ["array", "indented", "lines"])
def test_json_is_read_bit_by_bit(tmp_path, monkeypatch, chunk, form):
    monkeypatch.setattr(json_file, "CHUNK", chunk)
    path = tmp_path / "rows.json"
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    path.write_text({"array": json.dumps(ROWS), "indented": json.dumps(ROWS, indent=2), "lines": lines}[form])
    assert list(json_rows(path)) == ROWS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1}, {"a": ', r"Row 1 of `.*rows\.json` is not valid JSON"),
        ("not json", r"Row 0 of `.*rows\.json` is not valid JSON"),
        ('[{"a": 1}, {"b": 2}', r"`.*rows\.json` ends inside its list, after 2 rows: it was cut off"),
        ('[{"a": 1},', r"`.*rows\.json` ends inside its list, after 1 rows: it was cut off"),
    ],
)
def test_broken_json_is_named_with_its_row(tmp_path, text, message):
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        list(json_rows(path))


@pytest.fixture
def own_formats():
    before = dict(FORMATS)
    yield FORMATS
    FORMATS.clear()
    FORMATS.update(before)


def captions(row, images, where):
    if not row["caption"]:
        raise ValueError(f"{where} has no caption.")
    turns = (("user", "What is it?"), ("assistant", row["caption"]))
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def test_a_format_of_somebody_else(tmp_path, own_formats, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    register_format("captions", ["caption"], captions)
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"caption": "a dog"}, {"caption": ""}, {"caption": "a cat"}]))
    arguments = DataArguments(str(path), bad_rows="drop", max_bad_rows=1.0)
    rows = load_rows(arguments, columns=("prompt", "completion"))
    assert [row[0]["content"] for row in rows["completion"]] == ["a dog", "a cat"]
    assert list(rows["source_row"]) == [0, 2]
    Dataset.from_list([{"caption": "a dog"}]).to_parquet(tmp_path / "rows.parquet")
    rows = load_rows(DataArguments(str(tmp_path / "rows.parquet")), columns=("prompt", "completion"))
    assert rows[0]["completion"][0]["content"] == "a dog"

    # another reader of the same name reads the file anew
    own_formats.pop("captions")
    register_format("captions", ["caption"], captions)
    own_formats["captions"] = own_formats["captions"]._replace(read=upper)
    rows = load_rows(arguments, columns=("prompt", "completion"))
    assert rows[0]["completion"][0]["content"] == "A DOG"


def upper(row, images, where):
    return captions({"caption": row["caption"].upper()}, images, where)


def test_a_format_that_does_not_fit_is_refused(own_formats):
    with pytest.raises(ValueError, match="There is a format `LLaVA` already"):
        register_format("LLaVA", ["x"], captions)
    with pytest.raises(ValueError, match="`before` is 'x': give one of preference"):
        register_format("captions", ["caption"], captions, before="x")
    with pytest.raises(ValueError, match="`gives` is "):
        register_format("captions", ["caption"], captions, gives=("text",))
    register_format("first", ["prompt"], captions, before="preference")
    assert recognise(["prompt", "chosen", "rejected"], "rows") == "first"
