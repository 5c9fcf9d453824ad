"""Nothing of this machine in what is written to be shared, and in what a server receives of it."""

import gzip
import zipfile

import numpy as np
import pytest
from datasets import Dataset, Features, Value
from huggingface_hub import HfApi
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.numpy import save_file

from helpers.leaks import find_leaks, private_words
from llava_mod_hf.commands.arguments import DistillArguments
from llava_mod_hf.commands.cache_teacher import CacheCommand, finish_cache
from llava_mod_hf.data.arguments import DataArguments
from llava_mod_hf.data.parquet_shards import write_shards
from llava_mod_hf.publishing.push import push_dataset

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


def test_a_pushed_cache_tells_nothing_of_this_machine(hub, monkeypatch, tmp_path):
    words = private_words(monkeypatch, tmp_path, hub.token)
    features = Features({"key": Value("string"), "row": Value("int64")})
    folder = tmp_path / "caches" / "rows"
    write_shards(
        folder,
        2,
        {"teacher": "0123", "top_k": 1, "temperature": 1.0, "vocabulary": 8, "log_probs": "float16"},
        lambda rows: Dataset.from_list([{"key": "a-b", "row": row} for row in rows], features=features),
        shard_size=2,
    )
    distill = DistillArguments(student="s", teacher=f"{tmp_path}/removed/teacher")
    data = DataArguments(dataset_name=f"{tmp_path}/removed/rows.jsonl")
    finish_cache(
        folder, 2, {"top_k": 1, "temperature": 1.0, "vocabulary": 8}, distill, data, CacheCommand(2, push_to="me/rows")
    )
    assert find_leaks(folder, words) == []
    assert find_leaks(hub.received(), words) == []
    assert (
        "What the teacher `teacher` says at each response token of 2 rows of `rows.jsonl`"
        in (folder / "README.md").read_text()
    )


@pytest.mark.parametrize("where", ["README.md", "shards.yaml"])
def test_a_cache_with_a_path_or_a_token_is_not_pushed(hub, tmp_path, where):
    for name in ("README.md", "shards.yaml", "0-of-1.parquet"):
        (tmp_path / name).write_text("rows")
    for secret, expected in (("hf_" + "a1" * 17, "contains a Hub token"), (str(tmp_path.parent), "of this machine")):
        (tmp_path / where).write_text(f"made with {secret}, then")
        with pytest.raises(ValueError, match=f"{where}` .*{expected}") as caught:
            push_dataset(tmp_path, "me/rows")
        assert "a1a1" not in str(caught.value)
    assert not hub.requests
