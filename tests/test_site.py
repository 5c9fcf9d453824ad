"""The pages as a site: all of them in its navigation, its links those of pages, and nothing loaded from elsewhere."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]

spec = importlib.util.spec_from_file_location("site_pages", ROOT / "docs" / "site_pages.py")
site_pages = importlib.util.module_from_spec(spec)
spec.loader.exec_module(site_pages)

CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text())


def test_every_page_is_in_the_navigation_once():
    listed = []
    for section in CONFIG["nav"]:
        for pages in section.values():
            listed += [pages] if isinstance(pages, str) else pages
    shown = [page for page in site_pages.pages_of(ROOT).values() if page.endswith(".md") and "/" not in page]
    assert sorted(listed) == sorted(shown)
    assert {path.name for path in (ROOT / "docs").glob("*.md")} < set(listed)


@pytest.mark.parametrize(
    ("source", "link", "expected"),
    [
        ("README.md", "[a](docs/guide.md#x)", "[a](guide.md#x)"),
        ("README.md", "![a](docs/overview.svg)", "![a](overview.svg)"),
        ("docs/guide.md", "[a](../recipes/tiny/README.md)", "[a](recipes/tiny.md)"),
        ("docs/guide.md", "[a](../recipes/tiny)", "[a](recipes/tiny.md)"),
        ("docs/guide.md", "[a](../README.md)", "[a](index.md)"),
        ("docs/guide.md", "[a](data.md)", "[a](data.md)"),
        ("recipes/tiny/README.md", "[a](../../docs/data.md)", "[a](../data.md)"),
        ("recipes/tiny/README.md", "[a](../qwen2-0.5b/README.md)", "[a](qwen2-0.5b.md)"),
        ("docs/guide.md", "see [a](../Makefile).", "see a."),
        ("docs/guide.md", "[a](https://host.org/b.md)", "[a](https://host.org/b.md)"),
        ("docs/guide.md", "[a](#here)", "[a](#here)"),
        ("docs/guide.md", "```\n[a](../README.md)\n```", "```\n[a](../README.md)\n```"),
    ],
)
def test_a_link_of_a_file_becomes_that_of_its_page(source, link, expected):
    assert site_pages.for_the_site(link, source, site_pages.pages_of(ROOT)) == expected


def test_the_site_is_built_and_loads_nothing_from_elsewhere(tmp_path):
    if importlib.util.find_spec("mkdocs") is None:
        (pytest.fail if os.environ.get("LLAVA_MOD_TARGET") == "docs" else pytest.skip)("mkdocs: `make test-docs`")
    argv = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    process = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    pages = {
        path.parent.relative_to(tmp_path / "site").as_posix(): path for path in tmp_path.rglob("site/**/index.html")
    }
    assert {".", "sharing", "recipes/tiny", "CHANGELOG"} <= pages.keys()
    text = pages["."].read_text()
    assert 'href="own-data/"' in text and 'src="overview.svg"' in text
    loaded = [
        (name, found)
        for name, path in pages.items()
        for found in re.findall(r"<(?:script|img|link)[^>]*(?:src|href)=\"?(https?://[^\" >]+)", path.read_text())
        if 'rel="canonical"' not in found
    ]
    assert loaded == []
