"""Pictures of any shape and mode are read as they are shown, from a file to what a model sees."""

import json

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps

from llava_mod_hf.data.arguments import DataArguments
from llava_mod_hf.data.conversations import AnswersCollator
from llava_mod_hf.data.fitting import fit_rows
from llava_mod_hf.data.load import load_rows

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))
MODES = {"1": "png", "L": "png", "LA": "png", "P": "png", "RGB": "webp", "RGBA": "png", "CMYK": "jpg", "YCbCr": "jpg"}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def seen(folder, name, processor):
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "it"}]
    (folder / "rows.json").write_text(json.dumps([{"image": name, "conversations": turns}]))
    rows = load_rows(DataArguments(str(folder / "rows.json")), columns=("prompt", "completion"))
    (row,) = fit_rows(rows, processor, max_length=None)[0]
    batch = AnswersCollator(processor, completion_only_loss=True)([row])
    assert (batch["input_ids"] == processor.image_token_id).sum() == 16
    return batch["pixel_values"]


def expected(picture, processor):
    return processor.image_processor([picture.convert("RGB")], return_tensors="pt")["pixel_values"]


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_seen_in_its_colours(tmp_path, processor, mode):
    name = f"a.{MODES[mode]}"
    NOISE.convert(mode).save(tmp_path / name)
    with Image.open(tmp_path / name) as picture:
        assert torch.equal(seen(tmp_path, name, processor), expected(picture, processor))


@pytest.mark.parametrize("size", [(1, 1), (3, 2000), (2000, 3)])
def test_tiny_tall_and_wide_ones_are_read(tmp_path, processor, size):
    NOISE.resize(size).save(tmp_path / "a.png")
    assert torch.equal(seen(tmp_path, "a.png", processor), expected(NOISE.resize(size), processor))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_its_exif_says(tmp_path, processor, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    NOISE.save(tmp_path / "a.png", exif=exif)
    shown = ImageOps.exif_transpose(Image.open(tmp_path / "a.png"))
    assert shown.size == ((60, 40) if orientation < 5 else (40, 60))
    assert torch.equal(seen(tmp_path, "a.png", processor), expected(shown, processor))
    assert torch.equal(expected(shown, processor), expected(NOISE, processor)) == (orientation == 1)
