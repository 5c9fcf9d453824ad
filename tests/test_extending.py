"""docs/extending.md: its files are there, and its code does what it says from outside the package."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

import llava_mod_cli
import llava_mod_hf
from llava_mod_hf.data.arguments import DataArguments
from llava_mod_hf.data.formats import FORMATS
from llava_mod_hf.data.load import load_rows

PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text()
PACKAGE = Path(llava_mod_hf.__file__).parent


def code_of(heading):
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    return code


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`(\w+/\w+\.py)`", PAGE))))
def test_the_files_that_it_names_are_there(path):
    assert (PACKAGE / path).is_file()


@pytest.mark.parametrize(
    "name", re.findall(r"`([A-Z_]{5,}|read_row|logit_transform|evaluate_model)` of `(\w+/\w+\.py)`", PAGE)
)
def test_the_tables_that_it_names_are_in_their_files(name):
    table, path = name
    assert re.search(rf"^(def )?{table}\b", (PACKAGE / path).read_text(), re.MULTILINE)


def test_a_format_of_ones_own(tmp_path, monkeypatch):
    known = dict(FORMATS)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    try:
        exec(code_of("A format of data"), {})
        (row,) = read_captions(tmp_path)
    finally:
        FORMATS.clear()
        FORMATS.update(known)
    assert row["completion"] == [{"role": "assistant", "content": "A cat on a mat."}]
    assert row["images"][0].getpixel((0, 0)) == (255, 0, 0)


def read_captions(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "cat.png")
    rows = [{"image": "cat.png", "caption": caption} for caption in ("A cat on a mat.", "")]
    (tmp_path / "captions.json").write_text(json.dumps(rows))
    arguments = DataArguments(str(tmp_path / "captions.json"), bad_rows="drop")
    return load_rows(arguments, columns=("prompt", "completion"))


def test_a_command(tmp_path, monkeypatch, capsys):
    (tmp_path / "count_rows.py").write_text(code_of("A command"))
    monkeypatch.setattr(llava_mod_cli, "FOLDER", tmp_path)
    monkeypatch.setattr("llava_mod_hf.commands.__path__", [str(tmp_path)])
    argv = ["count-rows", "--dataset_name", "embedded:easy-vqa", "--dataset_config", "mixture", "--max_samples", "7"]
    assert llava_mod_cli.main(argv) == 0
    assert capsys.readouterr().out == "7\n"
