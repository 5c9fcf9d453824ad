"""The pages as a site: all in its navigation, its links those of pages, a reference, and nothing from elsewhere."""

import importlib.util
import re
from pathlib import Path

import pytest
import yaml

import llava_mod_hf
from helpers.site import build_site

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
    assert sorted(listed) == sorted([*shown, "reference.md"])
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


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """`dict[str, Path]`: the built pages by their folders."""
    return build_site(tmp_path_factory.mktemp("site"))


def test_the_site_is_built_and_loads_nothing_from_elsewhere(site):
    assert {".", "sharing", "recipes/tiny", "CHANGELOG"} <= site.keys()
    text = site["."].read_text()
    assert 'href="own-data/"' in text and 'src="overview.svg"' in text
    loaded = [
        (name, found)
        for name, path in site.items()
        for found in re.findall(r"<(?:script|img|link)[^>]*(?:src|href)=\"?(https?://[^\" >]+)", path.read_text())
        if 'rel="canonical"' not in found
    ]
    assert loaded == []


def test_the_reference_names_all_that_the_package_gives():
    paths = re.findall(r"^::: (\S+)$", site_pages.reference_page(ROOT), re.MULTILINE)
    assert len(paths) == len(set(paths))
    names = site_pages.public_names(ROOT)
    assert sorted(names) == sorted(llava_mod_hf.__all__)
    assert set(names.values()) | set(site_pages.OPTIONS) == set(paths)
    for name, path in names.items():
        given = getattr(llava_mod_hf, name)
        assert f"{given.__module__}.{given.__name__}" == path
    bases = {base for name in ("MimicConfig", "PreferenceConfig") for base in getattr(llava_mod_hf, name).__mro__}
    documented = {f"{base.__module__}.{base.__name__}" for base in bases if base.__name__.endswith("Options")}
    assert documented == set(site_pages.OPTIONS)


def test_the_reference_has_each_docstring_as_markdown(site):
    text = site["reference"].read_text()
    for path in [*site_pages.public_names(ROOT).values(), *site_pages.OPTIONS]:
        _, found, rest = text.partition(f'id="{path}"')
        assert found, path
        contents = rest.split('<div class="doc doc-contents')[1]
        assert re.search(r"<p>\S", contents.partition('class="doc doc-heading')[0]), path
    assert "<li><strong>kl_weight</strong> (<code>float</code>, <em>optional</em>, defaults to 1.0).</li>" in text
    assert "<p>The options of <code>BatchOptions</code>,\n" in text
    assert "Args:" not in text and "Returns:" not in text and "Raises:" not in text and "[`" not in text
