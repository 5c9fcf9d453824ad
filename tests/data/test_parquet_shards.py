"""Shards: a flipped bit is noticed, and the shard written anew; what is no settings file is said."""

import pytest
from datasets import Dataset
from PIL import Image

from llava_mod_hf.data.parquet_shards import check_shards, shard_path, write_shards
from llava_mod_hf.fingerprints import row_key
from llava_mod_hf.teachers.cached_teacher import CachedTeacher


def write(folder, **options):
    return write_shards(
        folder, 6, {"seed": 0}, lambda rows: Dataset.from_dict({"n": list(rows)}), shard_size=2, **options
    )


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("place", [5, 60, -20])
def test_a_flipped_bit_is_named_and_written_anew(tmp_path, place):
    assert write(tmp_path) == 3
    before = shard_path(tmp_path, 1, 3).read_bytes()
    check_shards(tmp_path)
    flip(shard_path(tmp_path, 1, 3), place)
    with pytest.raises(ValueError, match=r"train-00001-of-00003\.parquet` is damaged.*writes such shards anew"):
        check_shards(tmp_path)
    assert write(tmp_path) == 1
    check_shards(tmp_path)
    assert shard_path(tmp_path, 1, 3).read_bytes() == before
    assert write(tmp_path) == 0


def test_a_truncated_shard_is_named(tmp_path):
    write(tmp_path)
    path = shard_path(tmp_path, 2, 3)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"train-00002-of-00003\.parquet` is damaged"):
        check_shards(tmp_path)


@pytest.mark.parametrize("text", ["a: [1", "- 3", ""])
def test_settings_that_are_none_are_said(tmp_path, text):
    write(tmp_path)
    (tmp_path / "shards.yaml").write_text(text)
    for use in (check_shards, write, lambda folder: CachedTeacher(str(folder))):
        with pytest.raises(ValueError, match=r"shards\.yaml` is damaged.*: remove its folder"):
            use(tmp_path)


def test_other_settings_are_said_by_the_users_option(tmp_path):
    write(tmp_path)
    with pytest.raises(ValueError, match="give another `teacher_cache`"):
        write_shards(tmp_path, 6, {"seed": 1}, None, shard_size=2, option="teacher_cache")


def test_a_rows_key_says_its_alpha_and_its_single_image():
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    opaque = Image.new("RGBA", (4, 4), (255, 0, 0, 255))
    assert row_key({"prompt": "a", "images": [clear]}) != row_key({"prompt": "a", "images": [opaque]})
    red, blue = (Image.new("RGB", (4, 4), color) for color in ("red", "blue"))
    assert row_key({"prompt": "a", "image": red}) != row_key({"prompt": "a", "image": blue})
    assert row_key({"prompt": "a", "image": red}) == row_key({"prompt": "a", "images": [red]})
