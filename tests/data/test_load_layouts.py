"""The published layouts and splits, streamed or not."""

import numpy as np
import pytest
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image

from helpers.load_cases import COLUMNS, load, row, write
from llava_mod_hf.data.arguments import DataArguments
from llava_mod_hf.data.load import load_rows


def conversation(*texts, **columns):
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"conversations": turns, **columns}


LLAVA = [
    conversation("<image>\nwhat is it?", "a square", "its color?", "red", id=7, image="a.png"),
    conversation("hello?", "hi", id="text-only"),
    conversation("what is it?\n<image>", "blue", id="last", image="b.jpg"),
]


ANSWERS = ["a square", "red", "hi", "blue"]


def answers(dataset):
    return [row["completion"][0]["content"] for row in dataset]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_llavas_files(tmp_path, folder, suffix, streaming):
    path = write(tmp_path / f"rows{suffix}", LLAVA)
    rows = list(load(path, image_folder=str(folder), streaming=streaming, multi_turn="expand"))
    assert answers(rows) == ANSWERS
    assert [[image.size for image in row["images"]] for row in rows] == [[(8, 8)], [(8, 8)], [], [(16, 8)]]
    assert [row["source_row"] for row in rows] == [0, 0, 1, 2]
    assert [len(row["prompt"]) for row in rows] == [1, 3, 1, 1]
    assert "<image>" not in str([row["prompt"] for row in rows])
    assert set(rows[0]) == {"images", "prompt", "completion", "source_row"}

    rows = list(load(path, image_folder=str(folder), streaming=streaming, max_samples=2))
    assert [row["source_row"] for row in rows] == [0, 1]
    assert [[[turn["content"] for turn in row[name]] for name in ("prompt", "completion")] for row in rows] == [
        [["what is it?"], ["a square", "its color?", "red"]],
        [["hello?"], ["hi"]],
    ]


def test_a_changed_file_is_read_anew(tmp_path, folder):
    path = write(tmp_path / "rows.json", LLAVA)
    load(path, image_folder=str(folder))
    write(path, LLAVA[1:])
    assert answers(load(path, image_folder=str(folder))) == ANSWERS[2:]
    write(path, LLAVA)
    assert [len(load(path, image_folder=str(folder), multi_turn=name)) for name in ("whole", "expand")] == [3, 4]


def rlaif(folder, **columns):
    """Rows as the Hub's Parquet has them."""
    return {
        "image": {"bytes": (folder / "a.png").read_bytes(), "path": "a.png"},
        "question": "what is it?",
        "chosen": "a square",
        "rejected": "a circle",
        "idx": 3,
        "image_path": "elsewhere/a.png",
        **columns,
    }


PAIR = ("prompt", "chosen", "rejected")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", ["parquet", "struct", "json"])
def test_rlaif_v(tmp_path, folder, streaming, form):
    if form == "json":
        path = write(tmp_path / "rows.json", [rlaif(folder, image="a.png"), rlaif(folder, image="b.jpg")])
    else:
        rows, path = [rlaif(folder), rlaif(folder, rejected="blue")], tmp_path / "rows.parquet"
        dataset = Dataset.from_list(rows)
        (dataset.cast_column("image", ImageFeature()) if form == "parquet" else dataset).to_parquet(path)
    args = DataArguments(str(path), image_folder=str(folder), streaming=streaming)
    rows = list(load_rows(args, columns=PAIR))
    assert [row["images"][0].size for row in rows] == [(8, 8), (16, 8) if form == "json" else (8, 8)]
    assert rows[0]["prompt"] == [{"role": "user", "content": "what is it?"}]
    assert rows[1]["chosen"] == [{"role": "assistant", "content": "a square"}]
    assert [row["source_row"] for row in rows] == [0, 1]
    if form != "json":
        assert rows[1]["rejected"][0]["content"] == "blue"
        assert rows[0]["idx"] == 3 and "image" not in rows[0]


@pytest.mark.parametrize("streaming", [False, True])
def test_messages_and_a_single_image_in_a_folder_of_parquet(tmp_path, folder, streaming):
    (tmp_path / "set").mkdir()
    turns = [{"role": role, "content": text} for role, text in (("user", "a?"), ("assistant", "b"))]
    turns += [{"role": "user", "content": "c?"}, {"role": "assistant", "content": "d"}]
    rows = [{"messages": turns, "image": {"bytes": (folder / "a.png").read_bytes(), "path": None}, "kind": "x"}]
    for shard in range(2):
        dataset = Dataset.from_list(rows).cast_column("image", ImageFeature())
        dataset.to_parquet(tmp_path / "set" / f"train-{shard:05d}-of-00002.parquet")
    found = list(load(tmp_path / "set", streaming=streaming, multi_turn="expand"))
    assert answers(found) == ["b", "d"] * 2
    assert [len(row["prompt"]) for row in found] == [1, 3] * 2
    assert [row["images"][0].size for row in found] == [(8, 8)] * 4
    assert {row["kind"] for row in found} == {"x"}
    whole = list(load(tmp_path / "set", streaming=streaming))
    assert [(row["prompt"], row["completion"]) for row in whole] == [(turns[:1], turns[1:])] * 2
    assert {row["kind"] for row in whole} == {"x"} and set(whole[0]) == set(found[0])
    (tmp_path / "set" / "shards.yaml").write_text("num_shards: 3\n")
    with pytest.raises(ValueError, match="lacks 3 of 3 shards: run the command that wrote it again"):
        load(tmp_path / "set")


def test_a_folder_of_parquet_has_splits_and_is_not_taken_for_one_of_its_name(tmp_path):
    for place, answer in (("one", "a"), ("two", "b")):
        folder = tmp_path / place / "set"
        (folder / "data").mkdir(parents=True)
        (folder / "README.md").write_text(
            "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/*.parquet\n---\n"
        )
        for split in ("train", "test"):
            Dataset.from_list([row(answer=f"{answer} {split}")]).to_parquet(folder / "data" / f"{split}-0.parquet")
        assert answers(load(folder)) == [f"{answer} train"]
        assert answers(load_rows(DataArguments(str(folder)), columns=COLUMNS, split="test")) == [f"{answer} test"]
    with pytest.raises(ValueError, match="has no Parquet files of the split `validation`, only"):
        load_rows(DataArguments(str(folder)), columns=COLUMNS, split="validation")


@pytest.mark.parametrize("streaming", [False, True])
def test_trl_rows_streamed(tmp_path, folder, streaming):
    path = write(tmp_path / "rows.jsonl", [row("a.png", answer=str(i)) for i in range(5)])
    rows = list(load(path, image_folder=str(folder), streaming=streaming, max_samples=3))
    assert answers(rows) == ["0", "1", "2"]
    assert rows[2]["images"][0].getpixel((0, 0)) == (255, 0, 0)


def test_a_mistaken_format_says_what_was_found(tmp_path):
    path = write(tmp_path / "rows.json", [{"image": "a.png", "caption": "red"}])
    with pytest.raises(
        ValueError, match=r"rows\.json` has the columns \['image', 'caption'\], which is no known format"
    ):
        load(path)
    path = write(tmp_path / "pairs.json", [{"image": "a.png", "question": "?", "chosen": "a", "rejected": "b"}])
    with pytest.raises(ValueError, match="this stage needs completion as well"):
        load(path, image_folder=str(tmp_path), bad_rows="drop", max_bad_rows=1.0)


BAD = [
    LLAVA[0],
    conversation("<image>\nwhat?", "it", image="nowhere.png"),
    conversation("what?", ""),
    conversation("<image>what?", "it"),
    LLAVA[2],
]


@pytest.mark.parametrize("streaming", [False, True])
def test_bad_rows_stop_the_reading_or_are_left_out_and_named(tmp_path, folder, streaming, caplog):
    path = write(tmp_path / "rows.json", BAD)
    rows = list(load(path, image_folder=str(folder), bad_rows="drop", max_bad_rows=1.0, streaming=streaming))
    assert answers(rows) == ["a square", "blue"]
    assert [row["source_row"] for row in rows] == [0, 4]
    assert "problem" not in rows[0]
    for part in ("Row 1: image", "nowhere.png` does not exist", "Row 2: an answer is empty", "Row 3 has 0 images"):
        assert part in caplog.text
    for number, message in (
        (1, "Row 0: image `.*nowhere"),
        (2, "Row 0: an answer is empty"),
        (3, "Row 0 has 0 images"),
    ):
        write(path, BAD[number : number + 1])
        with pytest.raises(ValueError, match=message):
            list(load(path, image_folder=str(folder), streaming=streaming))


def test_headers_alone_find_what_is_no_image_but_not_what_is_cut(tmp_path, folder, monkeypatch):
    cut = folder / "cut.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(cut)
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    path = write(tmp_path / "rows.jsonl", [row("cut.jpg")])
    assert len(load(path, image_folder=str(folder), check_images="header")) == 1
    (folder / "text.png").write_text("text")
    write(path, [row("cut.jpg"), row("text.png")])
    with pytest.raises(ValueError, match=r"Row 1: .*text\.png` is not a whole image"):
        load(path, image_folder=str(folder), check_images="header")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    write(path, [row("cut.jpg")])
    with pytest.raises(ValueError, match="Row 0: .* is refused as a decompression bomb"):
        load(path, image_folder=str(folder), check_images="header")


@pytest.mark.parametrize("option", ["multi_turn", "check_images", "bad_rows"])
def test_unknown_choices_are_refused(option):
    with pytest.raises(ValueError, match=f"`{option}` is 'some': give one of"):
        DataArguments("rows.json", **{option: "some"})


def test_several_processes_read_the_same_rows(tmp_path, folder):
    path = write(tmp_path / "rows.jsonl", [row("a.png", answer=str(i)) for i in range(4)])
    args = DataArguments(str(path), image_folder=str(folder))
    assert answers(load_rows(args, columns=COLUMNS, num_proc=2)) == ["0", "1", "2", "3"]


def talk(*turns, images=()):
    said = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]
    return {"image": list(images), "conversations": said}


LATER_TALK = talk("<image>\nwhat?", "red", "and <image>this?", "blue", images=["a.png", "b.jpg"])


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", ["json", "parquet"])
def test_a_picture_of_a_later_question_makes_messages_of_parts(tmp_path, folder, streaming, suffix):
    rows = [talk("<image>\nwhat?", "red", images=["a.png"]), talk("hello?", "hi"), LATER_TALK]
    path = write(tmp_path / "rows.json", rows)
    if suffix == "parquet":
        path = tmp_path / "rows.parquet"
        Dataset.from_list(rows).to_parquet(path)
    one, text, later = load(path, image_folder=str(folder), streaming=streaming)
    shown, said = {"type": "image", "text": None}, lambda text: {"type": "text", "text": text}
    assert one["prompt"] == [{"role": "user", "content": [shown, said("what?")]}]
    assert text["prompt"] == [{"role": "user", "content": [said("hello?")]}]
    assert later["completion"] == [
        {"role": "assistant", "content": [said("red")]},
        {"role": "user", "content": [shown, said("and this?")]},
        {"role": "assistant", "content": [said("blue")]},
    ]
    assert [image.size for image in later["images"]] == [(8, 8), (16, 8)]
    path = write(tmp_path / "rows.json", rows[:2])  # and without such a row texts, as ever
    assert load(path, image_folder=str(folder))[0]["prompt"] == [{"role": "user", "content": "what?"}]


@pytest.mark.parametrize("bad_rows", ["error", "drop"])
def test_a_later_picture_that_a_stream_did_not_begin_with_is_told(tmp_path, folder, bad_rows):
    rows = [talk("hello?", str(number)) for number in range(150)]
    path = write(tmp_path / "rows.json", [*rows, LATER_TALK])
    given = {"image_folder": str(folder), "bad_rows": bad_rows}
    rows = load(path, streaming=True, **given)
    if bad_rows == "error":
        with pytest.raises(ValueError, match="Row 150 has a picture elsewhere .* leave out `streaming`"):
            list(rows)
    else:
        assert len(list(rows)) == 150
    assert len(load(path, **given)) == 151
