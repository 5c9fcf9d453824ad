"""Fixtures of this room's tests."""

import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    """Each test reads its files anew."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def folder(tmp_path):
    """Three images in a folder with a subfolder."""
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    for name, size, color in (("a.png", (8, 8), "red"), ("b.jpg", (16, 8), "blue"), ("more/c.png", (8, 16), "green")):
        Image.new("RGB", size, color).save(folder / name)
    return folder
