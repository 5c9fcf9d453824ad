"""Local data files: rows in TRL's formats, or one clear error that names row and file."""

import os

import numpy as np
import pytest
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image, ImageFile

from helpers.load_cases import COLUMNS, load, row, write
from llava_mod_hf.data.arguments import DataArguments
from llava_mod_hf.data.fitting import fit_rows
from llava_mod_hf.data.load import load_rows


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_local_files_with_images_in_a_folder(tmp_path, folder, suffix):
    rows = [row("a.png"), row(answer="no image"), row("more/c.png", "b.jpg", answer="two images")]
    dataset = load(write(tmp_path / f"rows{suffix}", rows), image_folder=str(folder))
    assert [[image.size for image in images] for images in dataset["images"]] == [[(8, 8)], [], [(8, 16), (16, 8)]]
    assert dataset[0]["images"][0].getpixel((0, 0)) == (255, 0, 0)
    assert dataset["completion"] == [row["completion"] for row in rows]
    assert dataset["prompt"] == [row["prompt"] for row in rows]


def test_images_are_found_beside_the_file_by_default(folder):
    dataset = load(write(folder / "rows.jsonl", [row("more/../a.png")]))
    assert dataset[0]["images"][0].size == (8, 8)


def test_rows_without_any_image(tmp_path):
    dataset = load(write(tmp_path / "rows.jsonl", [row(), row()]))
    assert list(dataset["images"]) == [[], []]


def test_images_inside_a_parquet_file(tmp_path, folder):
    images = List(ImageFeature())
    messages = [{"role": Value("string"), "content": Value("string")}]
    features = Features({"images": images, "prompt": messages, "completion": messages})
    path = tmp_path / "rows.parquet"
    inside = row({"bytes": (folder / "a.png").read_bytes(), "path": None})
    Dataset.from_list([inside, row()], features=features).to_parquet(path)
    assert load(path)[0]["images"][0].getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("bad_rows", ["error", "drop"])
def test_a_streamed_picture_is_the_one_of_the_file_read_once(tmp_path, monkeypatch, processor, bad_rows):
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.jpg", quality=95)
    inside = {"bytes": (tmp_path / "noise.jpg").read_bytes(), "path": None}
    features = {"image": ImageFeature(), "question": Value("string"), "answer": Value("string")}
    rows = [{"image": inside, "question": "what?", "answer": "noise"}] * 2
    Dataset.from_list(rows, features=Features(features)).to_parquet(tmp_path / "rows.parquet")
    expected = np.array(Image.open(tmp_path / "noise.jpg"))

    options = {"check_images": "header", "bad_rows": bad_rows}
    stream = load(tmp_path / "rows.parquet", streaming=True, **options)
    stream, _ = fit_rows(stream, processor, max_length=512, bad_rows=bad_rows)
    written, read, load_image = [], [], ImageFile.ImageFile.load
    monkeypatch.setattr(Image.Image, "save", lambda *args, **kwargs: written.append(args))
    monkeypatch.setattr(
        ImageFile.ImageFile, "load", lambda image: (read.append(image) if image.tile else None, load_image(image))[1]
    )
    found = list(stream)
    assert not written
    assert len(read) == 2 * 2  # `datasets` reads the first of a list twice, to see whether it has to be read
    monkeypatch.undo()
    for each in found:
        assert np.array_equal(np.array(each["images"][0]), expected)


def test_max_samples_takes_the_first(tmp_path, folder):
    path = write(tmp_path / "rows.jsonl", [row("a.png", answer=str(i)) for i in range(5)])
    for count in (1, 3, 5, 9):
        dataset = load(path, image_folder=str(folder), max_samples=count)
        assert [messages[0]["content"] for messages in dataset["completion"]] == [str(i) for i in range(min(count, 5))]


def test_rows_that_are_not_taken_are_not_checked(tmp_path, folder):
    path = write(tmp_path / "rows.jsonl", [row("a.png"), row("nowhere.png")])
    assert len(load(path, image_folder=str(folder), max_samples=1)) == 1


def test_an_image_that_broke_since_the_last_time_is_noticed(tmp_path, folder):
    path = write(tmp_path / "rows.jsonl", [row("a.png")])
    load(path, image_folder=str(folder))
    (folder / "a.png").unlink()
    with pytest.raises(ValueError, match=r"Row 0: image `.*a\.png` does not exist"):
        load(path, image_folder=str(folder))


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match=r"The data file `.*nowhere\.jsonl` does not exist: check `dataset_name`"):
        load(tmp_path / "nowhere.jsonl")


def test_file_that_is_not_json(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text("not: json\n")
    with pytest.raises(ValueError, match=r"rows\.json"):
        load(path)


@pytest.mark.parametrize("missing", ["images", "completion"])
def test_missing_column(tmp_path, folder, missing):
    rows = [{name: value for name, value in row("a.png").items() if name != missing}]
    path = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError, match=rf"`.*rows\.jsonl` has the columns .* this stage needs {missing} as well"):
        load(path, image_folder=str(folder))


def test_missing_columns_are_all_named(tmp_path):
    path = write(tmp_path / "rows.jsonl", [row()])
    with pytest.raises(ValueError, match="needs chosen, rejected as well"):
        load_rows(DataArguments(str(path)), columns=("prompt", "chosen", "rejected"))


@pytest.mark.parametrize("rows", [[], None], ids=["no row", "max_samples 0"])
def test_no_rows(tmp_path, rows):
    path = write(tmp_path / "rows.json", [row()] if rows is None else rows)
    with pytest.raises(ValueError, match=r"`.*rows\.json` has no rows"):
        load(path, max_samples=0 if rows is None else None)


@pytest.mark.parametrize("way", ["up", "absolute", "link", "linked folder"])
def test_image_path_that_leaves_the_folder(tmp_path, folder, way):
    secret = tmp_path / "secret" / "x.png"
    secret.parent.mkdir()
    Image.new("RGB", (8, 8)).save(secret)
    os.symlink(secret, folder / "link.png")
    os.symlink(secret.parent, folder / "linked")
    name = {"up": "../secret/x.png", "absolute": str(secret), "link": "link.png", "linked folder": "linked/x.png"}[way]
    path = write(tmp_path / "rows.jsonl", [row("a.png"), row(name)])
    with pytest.raises(ValueError, match=rf"Row 1: image `{secret}` lies outside the image folder `{folder}`"):
        load(path, image_folder=str(folder))


def test_a_link_inside_the_folder_is_followed(tmp_path, folder):
    os.symlink(folder / "a.png", folder / "more" / "link.png")
    dataset = load(write(tmp_path / "rows.jsonl", [row("more/link.png")]), image_folder=str(folder))
    assert dataset[0]["images"][0].size == (8, 8)


def test_missing_image(tmp_path, folder):
    path = write(tmp_path / "rows.jsonl", [row("a.png"), row("a.png", "nowhere.png")])
    with pytest.raises(ValueError, match=rf"Row 1: image `{folder}/nowhere\.png` does not exist"):
        load(path, image_folder=str(folder))


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_truncated_image(tmp_path, folder, suffix):
    whole, cut = folder / f"whole{suffix}", folder / f"cut{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(whole)
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    path = write(tmp_path / "rows.jsonl", [row(whole.name), row(cut.name)])
    with pytest.raises(ValueError, match=rf"Row 1: `{cut}` is not a whole image"):
        load(path, image_folder=str(folder))


@pytest.mark.parametrize("text", ["not an image", ""])
def test_file_that_is_no_image(tmp_path, folder, text):
    (folder / "text.png").write_text(text)
    path = write(tmp_path / "rows.jsonl", [row("text.png")])
    with pytest.raises(ValueError, match=rf"Row 0: `{folder}/text\.png` is not a whole image"):
        load(path, image_folder=str(folder))


@pytest.mark.parametrize("limit", [100, 200, 2000])
def test_decompression_bomb(tmp_path, folder, monkeypatch, limit):
    Image.new("RGB", (16, 16)).save(folder / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    path = write(tmp_path / "rows.jsonl", [row("a.png"), row("bomb.png")])
    if limit > 256:
        assert len(load(path, image_folder=str(folder))) == 2
        return
    # Pillow raises beyond twice its limit, and only warns before
    with pytest.raises(ValueError, match=rf"Row 1: `{folder}/bomb\.png` is refused as a decompression bomb"):
        load(path, image_folder=str(folder))


def test_unknown_embedded_data_is_refused():
    with pytest.raises(ValueError, match="There is no data set `embedded:imagenet`"):
        load("embedded:imagenet")


def test_embedded_data():
    dataset = load("embedded:easy-vqa", dataset_config="captions", max_samples=3)
    assert len(dataset) == 3
    assert set(dataset["kind"]) == {"caption"}
    other = load_rows(
        DataArguments("embedded:easy-vqa", "captions", max_samples=3), columns=COLUMNS, split="test", seed=1
    )
    assert dataset["answer"] != other["answer"]
