"""The README runs as it stands, its picture is what its script draws, and pages link what is there."""

import re
import runpy
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from llava_mod_hf import __version__, load_model_and_processor

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("recipes/**/*.md")])


def test_the_python_example_trains_and_saves_a_sparse_student(tmp_path, monkeypatch):
    example = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)[0]
    assert "max_steps=20" in example
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(example.replace("max_steps=20", "max_steps=2, report_to='none'"), names)
    model = AutoModelForImageTextToText.from_pretrained("runs/student")
    assert AutoProcessor.from_pretrained("runs/student").tokenizer.get_vocab()
    assert model.config.moe_layers == [0, 2]
    trained = names["student"].state_dict()
    assert all(torch.equal(tensor, trained[name]) for name, tensor in model.state_dict().items())
    assert names["trainer"].state.global_step == 2
    encoder = load_model_and_processor("embedded:tiny-teacher")[0].model.vision_tower.state_dict()
    assert all(torch.equal(tensor, trained["model.vision_tower." + name]) for name, tensor in encoder.items())


def test_the_picture_is_what_its_script_draws():
    drawn = runpy.run_path(str(ROOT / "docs" / "draw_overview.py"))["draw"]()
    assert (ROOT / "docs" / "overview.svg").read_text() == drawn
    svg = "{http://www.w3.org/2000/svg}"
    texts = {element.text for element in ET.fromstring(drawn).iter(svg + "text")}
    assert {"image", "vision encoder", "adaptor", "router", "small language model"} <= texts


def test_the_readme_is_one_page():
    assert len(README.read_text().splitlines()) <= 120


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_links_is_there(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_every_page_is_linked_from_the_readme():
    linked = set(re.findall(r"\]\(([^)#\s]+)\)", README.read_text()))
    assert {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")} - linked == set()


def test_the_version_is_one():
    (version,) = re.findall(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version == __version__
