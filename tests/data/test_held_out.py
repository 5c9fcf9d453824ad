"""Rows held out of training: nothing of a picture, or of a conversation, on both sides."""

import io
import json

import pytest
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image

from llava_mod_hf.data import easy_vqa, scene_rows
from llava_mod_hf.data.arguments import DataArguments
from llava_mod_hf.data.held_out import hold_out
from llava_mod_hf.data.load import load_rows


def picture(number):
    content = io.BytesIO()
    Image.new("RGB", (8, 8), (number, 0, 0)).save(content, "PNG")
    return {"bytes": content.getvalue(), "path": None}


def dataset(pictures, sources=None):
    """Rows with the pictures of these numbers, and of these rows of a data set."""
    columns = {"images": [[picture(n) for n in each] for each in pictures], "number": list(range(len(pictures)))}
    features = {"images": List(ImageFeature()), "number": Value("int64")}
    if sources:
        columns["source_row"], features["source_row"] = sources, Value("int64")
    return Dataset.from_dict(columns, features=Features(features))


def numbers(rows):
    return rows["number"][:]


def test_rows_of_one_picture_stay_together():
    rows = dataset([[n // 4] for n in range(40)])
    for seed in range(5):
        train, held = hold_out(rows, 0.2, seed=seed)
        assert sorted(numbers(train) + numbers(held)) == list(range(40))
        assert (numbers(train), numbers(held)) == (sorted(numbers(train)), sorted(numbers(held)))
        assert len(held) == 8
        assert not {n // 4 for n in numbers(train)} & {n // 4 for n in numbers(held)}


def test_turns_of_one_conversation_and_pictures_in_common_keep_rows_together():
    # text alone, in two conversations; a chain of pictures; one that stands alone
    rows = dataset([[], [], [], [1], [1, 2], [2, 3], [9]], sources=[0, 0, 1, 2, 3, 4, 5])
    together = [{0, 1}, {2}, {3, 4, 5}, {6}]
    seen = set()
    for seed in range(20):
        held = set(numbers(hold_out(rows, 1, seed=seed)[1]))
        assert held in together
        seen.add(tuple(sorted(held)))
    assert len(seen) == 4


def test_rows_of_one_number_in_two_data_sets_are_not_one():
    rows = dataset([[], [], [], []], sources=[0, 0, 1, 1]).add_column("source_dataset", [0, 1, 0, 1])
    assert {len(hold_out(rows, 1, seed=seed)[1]) for seed in range(5)} == {1}


def test_a_row_without_picture_or_source_stands_alone():
    train, held = hold_out(dataset([[] for _ in range(10)]), 3)
    assert (len(train), len(held)) == (7, 3)
    train, held = hold_out(dataset([[] for _ in range(10)]).select_columns("number"), 0.5)
    assert (len(train), len(held)) == (5, 5)


@pytest.mark.parametrize(("size", "count"), [(0.25, 5), (0.01, 1), (1, 1), (7, 7), (19, 19)])
def test_a_share_or_a_number(size, count):
    _, held = hold_out(dataset([[n] for n in range(20)]), size)
    assert len(held) == count


def test_the_seed_chooses_and_neither_the_order_nor_the_other_rows_do():
    rows = dataset([[n] for n in range(40)])
    held = [set(numbers(hold_out(rows, 10, seed=seed)[1])) for seed in (0, 0, 1)]
    assert held[0] == held[1] != held[2]
    turned = rows.select(list(range(39, -1, -1)))
    assert set(numbers(hold_out(turned, 10)[1])) == held[0]
    fewer = rows.select([n for n in range(40) if n in held[0] or n % 2])
    assert set(numbers(hold_out(fewer, 10)[1])) == held[0]


def test_a_folder_of_pictures_that_was_moved_is_split_the_same(tmp_path):
    held = []
    for folder in ("here", "over/there"):
        paths = [tmp_path / folder / f"{part}/{n}.png" for part in "ab" for n in range(40)]
        features = Features({"images": List(ImageFeature()), "number": Value("int64")})
        columns = {"images": [[str(path)] for path in paths], "number": list(range(80))}
        held.append([numbers(hold_out(Dataset.from_dict(columns, features=features), 20, seed=n)[1]) for n in (0, 1)])
    names = [{n % 40 for n in side} for side in held[0]]
    assert [len(side) for side in held[0]] == [20, 20]
    assert [{n % 40 for n in side} for side in held[1]] == names
    assert names[0] != names[1]


def test_of_files_of_one_name_the_folders_are_drawn_from(tmp_path):
    features = Features({"images": List(ImageFeature()), "number": Value("int64")})
    columns = {"images": [[str(tmp_path / f"{n}/picture.png")] for n in range(20)], "number": list(range(20))}
    rows = Dataset.from_dict(columns, features=features)
    held = [numbers(hold_out(rows, 5, seed=seed)[1]) for seed in (0, 1)]
    assert held[0] != held[1]
    assert len(held[0]) == 5


@pytest.mark.parametrize("size", [1.0 - 1e-9, 5, 100])
def test_nothing_left_to_train_on_is_refused(size):
    with pytest.raises(ValueError, match=r"of 5 rows, of which 2 groups .* none would be left to train on"):
        hold_out(dataset([[1], [1], [1], [2], [2]]), size)


def test_a_stream_is_refused():
    with pytest.raises(ValueError, match="`test_split_size` is 0.5, and these rows are streamed"):
        hold_out(dataset([[1], [2]]).to_iterable_dataset(), 0.5)


def test_a_file_of_conversations_is_split_by_picture_and_conversation(tmp_path):
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "that"}]
    turns += [{"from": "human", "value": "and?"}, {"from": "gpt", "value": "this"}]
    for name in range(6):
        Image.new("RGB", (8, 8), (name, 0, 0)).save(tmp_path / f"{name}.png")
    content = [{"image": f"{n % 6}.png", "conversations": turns} for n in range(12)]
    content += [{"conversations": [{"from": "human", "value": "so?"}, *turns[1:]]} for _ in range(4)]
    (tmp_path / "rows.json").write_text(json.dumps(content))
    args = DataArguments(dataset_name=str(tmp_path / "rows.json"), multi_turn="expand")
    rows = load_rows(args, columns=("prompt", "completion"))
    assert len(rows) == 32
    train, held = hold_out(rows, 0.3, seed=1)
    assert not set(train["source_row"]) & set(held["source_row"])
    pictures = [{image.getpixel((0, 0)) for row in side for image in row["images"]} for side in (train, held)]
    assert not pictures[0] & pictures[1]
    assert pictures[1]


@pytest.mark.parametrize(
    "rows",
    [easy_vqa.load("questions", "train").select(range(200)), scene_rows.load("mixture", "train", options={"rows": 60})],
    ids=["easy-vqa", "scenes"],
)
def test_an_embedded_world_is_split_by_picture(rows):
    train, held = hold_out(rows, 0.2)
    contents = [{image.tobytes() for row in side for image in row["images"]} for side in (train, held)]
    assert len(held) >= 0.2 * len(rows)
    assert not contents[0] & contents[1]
