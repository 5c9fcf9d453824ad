"""The page of a run: one file that needs nothing else, in both modes, and says what it is told."""

import base64
import re
from html.parser import HTMLParser

import pytest
from jinja2 import UndefinedError

from llava_mod_hf.publishing.summary_page import write_page

SAID = {
    "finding": "47 % right when distilled",
    "terms": "1,500 questions",
    "models": ["teacher", "distilled"],
    "measures": [("right answers", [("61.5", "±3.0"), ("47.4", "±3.1")]), ("hallucinated ↓", [("5.0", "±1.0")] * 2)],
    "compared": ["distilled − supervised"],
    "differences": [("right answers", [("+4.1", "+1.4 to +6.9", "better")]), ("count", [("+0.1", "−1.0 to +1.0", "")])],
    "checkpoints": [
        {"name": "distilled", "folder": "runs/<a>", "active": "207,104", "steps": 2, "seconds": "3", "loss": "1 → 2"}
    ],
    "teacher_active": "716,288",
    "published": "runs/hub",
    "pairs": {"prompts": 600, "rows": 580},
    "wrong_answers": "30 %",
    "facts": {"seed": 3, "torch": "2.13.0"},
    "command": "llava-mod quickstart --seed 3",
}

VOID = {"meta", "img", "source", "br", "link"}


class Page(HTMLParser):
    """The tags that are open at the end, the cells of each row, and every attribute."""

    def __init__(self, text):
        super().__init__()
        self.open, self.rows, self.attributes, self.words = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, *each) for each in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


@pytest.fixture
def page(tmp_path):
    (tmp_path / "summary.png").write_bytes(b"light")
    write_page(tmp_path / "summary.html", SAID, tmp_path / "summary.png", b"dark")
    return (tmp_path / "summary.html").read_text(encoding="utf-8")


def test_the_page_is_whole_and_says_what_it_is_told(page):
    found = Page(page)
    assert found.open == []
    assert ["%", "teacher", "distilled"] in found.rows
    assert ["right answers", "61.5 ±3.0", "47.4 ±3.1"] in found.rows
    assert ["right answers", "+4.1 better +1.4 to +6.9"] in found.rows
    assert ["count", "+0.1 −1.0 to +1.0"] in found.rows
    assert ["distilled", "207,104", "2", "3", "1 → 2", "runs/<a>"] in found.rows
    text = " ".join(found.words)
    for said in ("47 % right when distilled", "716,288", "580 pairs from 600", "30 % are wrong", "runs/hub", "2.13.0"):
        assert said in text
    assert SAID["command"] in text


def test_the_page_needs_nothing_else(page):
    found = Page(page)
    links = [value for _, name, value in found.attributes if name in ("src", "srcset", "href", "action")]
    assert links and all(link.startswith("data:image/png;base64,") for link in links)
    assert not re.search(r"<script|@import|url\(|https?:", page)


def test_each_mode_has_its_picture_and_its_colours(page):
    found = Page(page)
    pictures = {tag: base64.b64decode(value.split(",")[1]) for tag, name, value in found.attributes if "src" in name}
    assert pictures == {"source": b"dark", "img": b"light"}
    assert ("source", "media", "(prefers-color-scheme: dark)") in found.attributes
    light, dark = re.findall(r":root \{(.*?)\}", page)
    names = [set(re.findall(r"--(\w+):", colors)) for colors in (light, dark)]
    assert names[0] == names[1] and light != dark
    assert set(re.findall(r"var\(--(\w+)\)", page)) <= names[0]


def test_what_is_not_told_is_noticed(tmp_path):
    (tmp_path / "summary.png").write_bytes(b"")
    with pytest.raises(UndefinedError):
        write_page(tmp_path / "summary.html", {**SAID, "pairs": {}}, tmp_path / "summary.png", b"")
