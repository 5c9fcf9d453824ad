"""The card of a student that was trained, measured and published here, as a browser shows it."""

import re
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from helpers.browser import browsing, requested, screenshot
from llava_mod_cli import main

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]

STYLE = """
body { font: 13px/1.5 system-ui, sans-serif; max-width: 66em; margin: 2em auto; color: #1f2328; }
table { border-collapse: collapse; margin: 1em 0; } th, td { border: 1px solid #d1d9e0; padding: 4px 12px; }
pre { background: #f6f8fa; padding: 1em; overflow-x: auto; } img { max-width: 26em; } td { white-space: nowrap; }
h2, h3 { border-bottom: 1px solid #d1d9e0; padding-bottom: 4px; }
"""


def run(*argv):
    assert main([str(arg) for arg in argv]) == 0


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A repository in a folder: twenty steps from the scenes' teacher, made sparse, to its own answers."""
    folder = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        recipe = ["--config", ROOT / "recipes/scenes/3_mimic_sparse.yaml", "--student", "embedded:scenes-clean-teacher"]
        run("mimic", *recipe, "--output_dir", "runs/sparse", "--max_steps", 20, "--dataset_options", '{"rows": 640}')
        rows = [
            "--dataset_name",
            "embedded:scenes",
            "--dataset_config",
            "mixture",
            "--dataset_options",
            '{"rows": 600}',
        ]
        measures = ["--teacher", "embedded:scenes-teacher", "--measures", "exact_match", "pope", "chair"]
        run("evaluate", "--model", "runs/sparse", *rows, *measures)
        run("publish", "--checkpoint", "runs/sparse", "--output_dir", "hub/scenes-llava-mod")
    return folder / "hub" / "scenes-llava-mod"


@pytest.fixture
def browser(published, tmp_path):
    """A browser at the card, its metadata left out as the Hub does."""
    markdown = re.sub(r"\A---\n.*?\n---\n", "", (published / "README.md").read_text(), flags=re.DOTALL)
    html = MarkdownIt("commonmark").enable("table").render(markdown)
    page = published / "card.html"
    page.write_text(f'<!doctype html><meta charset="utf-8"><title>card</title><style>{STYLE}</style>{html}')
    with browsing(tmp_path / "profile", page.as_uri(), width=1000, height=3400) as browser:
        yield browser
    page.unlink()


def test_the_card_is_what_it_should_look_like(browser, tmp_path):
    shown = browser.find_element("tag name", "body").text
    headings = [heading.text for heading in browser.find_elements("css selector", "h1, h2, h3")]
    assert headings == [
        *("scenes-llava-mod", "Usage", "Results", "Routers", "Size", "Training", "Data", "Limitations", "Citation"),
    ]
    prose = browser.execute_script(
        "const body = document.body.cloneNode(true);"
        "body.querySelectorAll('pre, style').forEach(each => each.remove());"
        "return body.textContent"
    )
    assert not re.search(r"\||\*\*|^#|\]\(|`|None|nan", prose, flags=re.M)  # of markup that is none
    results = [row.text for row in browser.find_elements("css selector", "table:nth-of-type(2) tr")]
    assert results[0] == "student teacher blind"
    assert any(re.fullmatch(r"POPE: F1 ↑( \d\.\d{3} \(\d\.\d{3}–\d\.\d{3}\)){2}.*", row) for row in results), results
    sizes = browser.execute_script("return Array.from(document.images).map(image => image.naturalWidth)")
    assert len(sizes) == 2 and min(sizes) > 300
    assert "in brackets 95 % intervals" in shown and "questions of the test split of embedded:scenes" in shown
    assert (
        "safetensors, F32" in shown
        and "not recorded" not in shown
        and "not measured" not in shown.replace("– is not", "")
    )
    assert not requested(browser)
    assert screenshot(browser, "card.png", tmp_path).stat().st_size > 50_000
