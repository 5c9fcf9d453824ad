"""Nothing of this machine in what is written to be shared, and in what a server receives of it."""

import gzip
import zipfile

import numpy as np
import pytest
from huggingface_hub import HfApi
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.numpy import save_file

from helpers.leaks import find_leaks

WORD = "/home/qzuser"


def write_text(path):
    path.write_text(f'{{"output_dir": "{WORD}/runs"}}')


def write_zip(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data.pkl", WORD * 10)


def write_gzip(path):
    path.write_bytes(gzip.compress(WORD.encode() * 10))


def write_safetensors(path):
    save_file({"a": np.zeros(2)}, path, metadata={"from": WORD})


def write_png(path):
    info = PngInfo()
    info.add_text("Comment", WORD * 10, zip=True)
    Image.new("RGB", (4, 4)).save(path, format="PNG", pnginfo=info)


def write_international_png(path):
    info = PngInfo()
    info.add_itxt("Comment", WORD * 10, zip=True)
    Image.new("RGB", (4, 4)).save(path, format="PNG", pnginfo=info)


@pytest.mark.parametrize(
    "write", [write_text, write_zip, write_gzip, write_safetensors, write_png, write_international_png]
)
def test_the_search_finds_a_word_wherever_it_is_packed(tmp_path, write):
    (tmp_path / "deep").mkdir()
    write(tmp_path / "deep" / "file")
    assert find_leaks(tmp_path, [WORD]) == [f"deep/file: {WORD}"]
    assert find_leaks({"file": (tmp_path / "deep" / "file").read_bytes()}, [WORD, "qzhost"]) == [f"file: {WORD}"]
    assert find_leaks(tmp_path, ["qzhost"]) == []


def test_the_search_reads_names():
    assert find_leaks({"runs/events.qzhost.0": b""}, ["qzhost"]) == ["runs/events.qzhost.0: qzhost"]


def test_the_server_shows_all_that_it_received(hub):
    operation = {"path_or_fileobj": b"small " + WORD.encode(), "path_in_repo": "a.txt", "repo_id": "me/x"}
    api = HfApi()
    api.create_repo("me/x")
    api.upload_file(**operation)
    api.upload_file(**{**operation, "path_or_fileobj": b"large " + WORD.encode(), "path_in_repo": "a.png"})
    found = "\n".join(find_leaks(hub.received(), [WORD]))
    assert "preupload/main [0]" in found and "commit/main [0]" in found and "PUT /lfs/" in found
    assert "a.txt" in found and "a.png" in found
