"""One data set of each published layout, written as it is on the Hub or on a disk, down to its quirks."""

import csv
import io
import json
import tarfile

import pytest
from datasets import Dataset, Features, List, Value, load_dataset
from datasets import Image as ImageFeature
from PIL import Image

from helpers.load_cases import COLUMNS
from llava_mod_hf.data import load as load_module
from llava_mod_hf.data.arguments import DataArguments
from llava_mod_hf.data.load import load_rows

PAIR = ("prompt", "chosen", "rejected")
RED, BLUE, GREEN = (255, 0, 0), (0, 0, 255), (0, 128, 0)


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """`datasets` waits for Arrow's threads at the end of streams of Parquet that were interleaved."""
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


def picture(folder, name="a.png"):
    return {"bytes": (folder / name).read_bytes(), "path": name}


def parquet(path, rows, features):
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows, features=Features(features)).to_parquet(path)
    return path.parent


def texts(*names):
    return {name: Value("string") for name in names}


def turns(question, answer):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def said(row):
    """The questions and answers of a row, and the first pixel of each picture."""
    words = [message["content"] for name in COLUMNS for message in row[name]]
    return words, [image.convert("RGB").getpixel((0, 0)) for image in row["images"]]


# Writers: a folder with pictures, where to write → what to load, its other options, what it says


def llava_json(folder, place):
    """liuhaotian/LLaVA-Instruct-150K, `llava_v1_5_mix665k.json`: ids of two types, rows without a picture."""
    rows = [
        {"id": "000000033471", "image": "a.png", "conversations": turns("<image>\nWhat colors?", "Red.")},
        {"id": 7, "conversations": turns("How are you?", "Well."), "model": ""},
    ]
    (place / "mix.json").write_text(json.dumps(rows))
    return (
        place / "mix.json",
        {"image_folder": str(folder)},
        [(["What colors?", "Red."], [RED]), (["How are you?", "Well."], [])],
    )


def llava_lines(folder, place):
    """OpenGVLab/InternVL-Chat-V1-2-SFT-Data, `ai2d_train_12k.jsonl`: the same, a line each."""
    rows = [{"id": 1, "image": "more/c.png", "conversations": turns("<image>\nWhich?", "B")}]
    (place / "ai2d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place / "ai2d.jsonl", {"image_folder": str(folder)}, [(["Which?", "B"], [GREEN])]


def onevision(folder, place):
    """lmms-lab/LLaVA-OneVision-Data: a picture or none, and LLaVA's conversations."""
    rows = [
        {"id": "1", "image": picture(folder), "conversations": turns("<image>\nWhat?", "Red."), "data_source": "x"},
        {"id": "2", "image": None, "conversations": turns("Two and two?", "Four."), "data_source": "x"},
    ]
    turn = List(texts("from", "value"))
    features = {**texts("id"), "image": ImageFeature(), "conversations": turn, **texts("data_source")}
    path = parquet(place / "set" / "train-00000-of-00001.parquet", rows, features)
    return path, {}, [(["What?", "Red."], [RED]), (["Two and two?", "Four."], [])]


def the_cauldron(folder, place):
    """HuggingFaceM4/the_cauldron: several pictures, several questions about them, none with a placeholder."""
    pairs = [
        {"user": "Do they differ?", "assistant": "Yes.", "source": "nlvr2"},
        {"user": "How?", "assistant": "By color.", "source": "nlvr2"},
    ]
    rows = [{"images": [picture(folder), picture(folder, "more/c.png")], "texts": pairs}]
    features = {"images": List(ImageFeature()), "texts": List(texts("user", "assistant", "source"))}
    path = parquet(place / "set" / "nlvr2" / "train-00000-of-00001.parquet", rows, features)
    pictures = [RED, GREEN]
    whole = ["Do they differ?", "Yes.", "How?", "By color."]
    return path, {}, [(whole, pictures)]


def trl_answers(folder, place):
    """trl-lib/llava-instruct-mix: pictures, a prompt and a completion of messages."""
    rows = [
        {
            "images": [picture(folder)],
            "prompt": [{"content": "What?", "role": "user"}],
            "completion": [{"content": "Red.", "role": "assistant"}],
        }
    ]
    message = List(texts("content", "role"))
    features = {"images": List(ImageFeature()), "prompt": message, "completion": message}
    path = parquet(place / "set" / "data" / "train-00000-of-00001.parquet", rows, features).parent
    return path, {}, [(["What?", "Red."], [RED])]


def add(archive, name, data):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def as_jpeg(path):
    found = io.BytesIO()
    Image.open(path).convert("RGB").save(found, "jpeg", quality=100, subsampling=0)
    return found.getvalue()


def shards(folder, place):
    """WebDataset: a picture and its JSON under one name; here without a picture, and with an id of another type."""
    (place / "shards").mkdir()
    for shard, (name, word) in enumerate((("a.png", "Red."), ("b.jpg", "Blue."))):
        with tarfile.open(place / "shards" / f"train-{shard:06d}.tar", "w") as archive:
            row = {"id": shard, "image": "elsewhere.jpg", "conversations": turns("<image>\nWhat?", word)}
            add(archive, f"{shard:08d}.jpg", as_jpeg(folder / name))
            add(archive, f"{shard:08d}.json", json.dumps(row).encode())
            if shard:
                add(archive, "text.json", json.dumps({"id": "x", "conversations": turns("Hello?", "Hi.")}).encode())
    expected = [(["What?", "Red."], [(254, 0, 0)]), (["What?", "Blue."], [(0, 0, 254)]), (["Hello?", "Hi."], [])]
    return place / "shards", {}, expected


def shard_of_captions(folder, place):
    """img2dataset's shards: a picture, its caption, and what is known of both."""
    with tarfile.open(place / "00000.tar", "w") as archive:
        add(archive, "00000/000000000.png", (folder / "a.png").read_bytes())
        add(archive, "00000/000000000.txt", b"A red square.")
        add(archive, "00000/000000000.json", json.dumps({"caption": "A red square.", "width": 8}).encode())
    return place / "00000.tar", {}, [(["", "A red square."], [RED])]


def folder_with_csv(folder, place):
    """An image folder: names of pictures and their captions, beside the pictures."""
    with (folder / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file_name", "text"), ("a.png", "A red, small square."), ("more/c.png", "Green.")])
    return folder, {}, [(["", "A red, small square."], [RED]), (["", "Green."], [GREEN])]


def folder_with_questions(folder, place):
    with (folder / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [("file_name", "question", "answer"), ("a.png", "What?", "Red."), ("", "Hi?", "Hello.")]
        )
    return folder, {}, [(["What?", "Red."], [RED]), (["Hi?", "Hello."], [])]


def folder_with_lines(folder, place):
    """The same of a split, with several pictures and messages, which no CSV can hold."""
    (folder / "train").mkdir()
    Image.new("RGB", (8, 8), "blue").save(folder / "train" / "x.png")
    messages = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "Blue."}]
    rows = [{"file_names": ["x.png", "x.png"], "messages": messages}]
    (folder / "train" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder, {}, [(["What?", "Blue."], [BLUE, BLUE])]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "layout",
    [
        llava_json,
        llava_lines,
        onevision,
        the_cauldron,
        trl_answers,
        shards,
        shard_of_captions,
        folder_with_csv,
        folder_with_questions,
        folder_with_lines,
    ],
    ids=lambda layout: layout.__name__,
)
def test_answers(tmp_path, folder, layout, streaming):
    path, options, expected = layout(folder, tmp_path)
    rows = load_rows(DataArguments(str(path), streaming=streaming, **options), columns=COLUMNS)
    assert [said(row) for row in rows] == expected
    # and as a part of a mixture
    entry = {"path": str(path), **options, "weight": 1}
    other = {"path": "embedded:scenes", "name": "presence", "options": {"rows": 9}, "weight": 1}
    rows = load_rows(DataArguments(datasets=[entry, other], streaming=streaming), columns=COLUMNS)
    assert [said(row) for row in rows if row["source_dataset"] == 0][: len(expected)] == expected


def rlaif_v(folder, place):
    """openbmb/RLAIF-V-Dataset: Parquet with the picture inside."""
    names = ("ds_name", "question", "chosen", "rejected", "origin_dataset", "origin_split", "idx", "image_path")
    row = dict.fromkeys(names, "x") | {"question": "What?", "chosen": "Red.", "rejected": "Blue."}
    features = {**texts("ds_name"), "image": ImageFeature(), **texts(*names[1:])}
    return parquet(place / "set" / "RLAIF-V-Dataset_000.parquet", [{**row, "image": picture(folder)}], features), {}


def rlaif_v_json(folder, place):
    """The same as JSON, with the picture's path."""
    row = {"idx": 0, "image": "a.png", "question": "What?", "chosen": "Red.", "rejected": "Blue."}
    (place / "pairs.json").write_text(json.dumps([row]))
    return place / "pairs.json", {"image_folder": str(folder)}


def trl_pairs(folder, place):
    """trl-lib/rlaif-v: messages of parts, the picture a part of the prompt."""
    part = List(texts("text", "type"))
    message = List({"content": part, "role": Value("string")})

    def says(role, *parts):
        return [{"content": [{"text": text, "type": kind} for kind, text in parts], "role": role}]

    row = {
        "images": [picture(folder)],
        "prompt": says("user", ("image", None), ("text", "What?")),
        "chosen": says("assistant", ("text", "Red.")),
        "rejected": says("assistant", ("text", "Blue.")),
    }
    features = {"images": List(ImageFeature()), **dict.fromkeys(PAIR, message)}
    return parquet(place / "set" / "train-00000-of-00001.parquet", [row], features), {}


@pytest.mark.parametrize("streaming", [False, True])
def test_pairs_and_a_mixture_of_their_layouts(tmp_path, folder, streaming):
    entries = []
    for number, layout in enumerate((rlaif_v, rlaif_v_json, trl_pairs)):
        place = tmp_path / str(number)
        place.mkdir()
        path, options = layout(folder, place)
        (row,) = load_rows(DataArguments(str(path), streaming=streaming, **options), columns=PAIR)
        assert "What?" in str(row["prompt"]) and row["images"][0].getpixel((0, 0)) == RED
        entries.append({"path": str(path), "weight": 1, **options})
    arguments = DataArguments(
        datasets=entries, streaming=streaming, stopping_strategy="all_exhausted_without_replacement"
    )
    rows = list(load_rows(arguments, columns=PAIR))
    assert sorted(row["source_dataset"] for row in rows) == [0, 1, 2]
    for row in rows:
        assert [row[name] for name in PAIR] == [
            [{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]}],
            [{"role": "assistant", "content": [{"type": "text", "text": "Red."}]}],
            [{"role": "assistant", "content": [{"type": "text", "text": "Blue."}]}],
        ]
        assert row["images"][0].getpixel((0, 0)) == RED


@pytest.mark.parametrize("streaming", [False, True])
def test_shards_of_the_hub_as_datasets_reads_them(tmp_path, folder, streaming, monkeypatch):
    with tarfile.open(tmp_path / "hub.tar", "w") as archive:
        for number, name in enumerate(("a.png", "b.jpg")):
            add(archive, f"{number}.png", (folder / name).read_bytes() if number == 0 else as_png(folder / name))
            row = {"id": number, "conversations": turns("<image>\nWhat?", name)}
            add(archive, f"{number}.json", json.dumps(row).encode())
    asked = []

    def from_hub(name, config, **options):
        asked.append((name, config, {key: options[key] for key in options.keys() - {"split", "streaming"}}))
        files = str(tmp_path / "hub.tar")
        return load_dataset("webdataset", data_files=files, split="train", streaming=options["streaming"])

    monkeypatch.setattr(load_module, "load_dataset", from_hub)
    rows = load_rows(DataArguments("owner/shards", streaming=streaming), columns=COLUMNS)
    assert [said(row)[0] for row in rows] == [["What?", "a.png"], ["What?", "b.jpg"]]
    assert said(next(iter(rows)))[1] == [RED]
    entry = {"path": "owner/shards", "name": "config", "data_files": "train/*.tar", "data_dir": "x"}
    rows = load_rows(DataArguments(datasets=[entry], streaming=streaming), columns=COLUMNS)
    assert [row["source_row"] for row in rows] == [0, 1]
    assert asked[-1] == ("owner/shards", "config", {"data_files": "train/*.tar", "data_dir": "x"})


def as_png(path):
    found = io.BytesIO()
    Image.open(path).save(found, "png")
    return found.getvalue()


def tar_with(path, **files):
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            add(archive, name.replace("_", "."), data)
    return path


@pytest.mark.parametrize(
    ("suffix", "data", "told"),
    [
        (".csv", b"file_name,text\na.png,b,c\n", "Row 0 of `.*csv` has more values than columns"),
        (".csv", b"file_name,text\na.png,\xff\n", "is not text in UTF-8"),
        (".csv", b"file_name,text\n", "has no rows of `{key: value}`"),
        (".tar", b"not a tar", "is not a whole tar archive"),
        (".tar", b"", "is not a whole tar archive"),
    ],
)
def test_damaged_files(tmp_path, suffix, data, told):
    path = tmp_path / f"metadata{suffix}"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=told):
        load_rows(DataArguments(str(path)), columns=COLUMNS)


def test_shards_that_are_cut_off_or_hold_no_json(tmp_path, folder):
    row = json.dumps({"conversations": turns("<image>?", "red")}).encode()
    whole = tar_with(tmp_path / "whole.tar", a_json=row, a_png=(folder / "a.png").read_bytes(), b_json=row)
    cut = tmp_path / "cut.tar"
    cut.write_bytes(whole.read_bytes()[:700])
    with pytest.raises(ValueError, match=r"cut.tar` is not a whole tar archive"):
        load_rows(DataArguments(str(cut)), columns=COLUMNS)
    with pytest.raises(ValueError, match=r"`a.json` of `.*tar` is not valid json"):
        load_rows(DataArguments(str(tar_with(tmp_path / "no.tar", a_json=b"{"))), columns=COLUMNS)
    with pytest.raises(ValueError, match=r"Row 1 has 0 images and 1 `<image>`"):
        load_rows(DataArguments(str(whole)), columns=COLUMNS)
    rows = load_rows(DataArguments(str(whole), bad_rows="drop", max_bad_rows=1.0), columns=COLUMNS)
    assert [said(row) for row in rows] == [(["?", "red"], [RED])]
    broken = tar_with(tmp_path / "broken.tar", a_json=row, a_png=(folder / "a.png").read_bytes()[:60])
    with pytest.raises(ValueError, match="Row 0: image `a.png` is not a whole image"):
        load_rows(DataArguments(str(broken)), columns=COLUMNS)


def test_pictures_of_a_folder_stay_inside_it(tmp_path, folder):
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    (folder / "metadata.csv").write_text("file_name,text\n../secret.png,x\n")
    with pytest.raises(ValueError, match="Row 0: image `.*secret.png` lies outside the image folder"):
        load_rows(DataArguments(str(folder)), columns=COLUMNS)
    (folder / "metadata.csv").write_text("file_name,text\na.png,x\n,x\n")
    with pytest.raises(ValueError, match="Row 1 has no image that its `text` could be of"):
        load_rows(DataArguments(str(folder)), columns=COLUMNS)


def test_splits_of_folders(tmp_path, folder):
    (folder / "test").mkdir()
    Image.new("RGB", (8, 8), "blue").save(folder / "test" / "x.png")
    (folder / "test" / "metadata.csv").write_text("file_name,text\nx.png,a test\n")
    (folder / "metadata.csv").write_text("file_name,text\na.png,training\n")
    for split, word in (("train", "training"), ("test", "a test")):
        (row,) = load_rows(DataArguments(str(folder)), columns=COLUMNS, split=split)
        assert said(row)[0][1] == word
    shards(folder, tmp_path)
    with pytest.raises(
        ValueError, match="has no WebDataset files of the split `test`, only .*: name them `test-….tar`"
    ):
        load_rows(DataArguments(str(tmp_path / "shards")), columns=COLUMNS, split="test")


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"texts": []}, "Row 0: `texts` must be a list of `{user, assistant}`, at least one"),
        ({"texts": [{"user": "a"}]}, "Row 0: `texts` must be a list of `{user, assistant}`"),
        ({"texts": [{"user": "a", "assistant": ""}]}, "Row 0: an answer is empty"),
        ({"texts": [{"user": "a", "assistant": 3}]}, "the `value` of a turn is 3: give a text"),
        ({"question": "a", "answer": None}, "Row 0: an answer is empty"),
        ({"image": "a.png", "text": ""}, "Row 0: an answer is empty"),
    ],
)
def test_malformed_rows_are_named(tmp_path, folder, row, told):
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    with pytest.raises(ValueError, match=told):
        load_rows(DataArguments(str(tmp_path / "rows.json"), image_folder=str(folder)), columns=COLUMNS)
