"""
The site of these pages (`make docs`): README, recipes and CHANGELOG become pages too, and links go on between them.

In the repository every link is that of a file, as GitHub follows it; here each becomes that of the page which that
file has become. What is no page, such as a test, keeps its words and loses its link.
"""

import posixpath
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]

LINK = re.compile(r"(?<!`)\[([^\]]*)\]\(([^)#\s:]+)(#[^)\s]*)?\)")

CODE = re.compile(r"(```.*?```)", re.DOTALL)


def pages_of(root):
    """
    What a site shows, by what the repository has.

    Args:
        root (`Path`): the repository.

    Returns:
        `dict[str, str]`: path in the repository → path in the site, pictures included.
    """
    found = {"README.md": "index.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md"}
    for path in sorted(root.glob("recipes/*/README.md")):
        found[path.relative_to(root).as_posix()] = f"recipes/{path.parent.name}.md"
    for path in sorted(root.glob("docs/*")):
        if path.suffix in (".md", ".png", ".svg"):
            found[f"docs/{path.name}"] = path.name
    return found


def for_the_site(text, source, pages):
    """
    A page whose links are those of the site.

    Args:
        text (`str`): Markdown.
        source (`str`): its path in the repository.
        pages (`dict[str, str]`): as of [`pages_of`].

    Returns:
        `str`.
    """

    def relinked(match):
        words, link, anchor = match[1], match[2], match[3] or ""
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
        if target not in pages and f"{target}/README.md" in pages:
            target = f"{target}/README.md"
        if target not in pages:
            return words
        return f"[{words}]({posixpath.relpath(pages[target], posixpath.dirname(pages[source]) or '.')}{anchor})"

    parts = CODE.split(text)
    return "".join(part if part.startswith("```") else LINK.sub(relinked, part) for part in parts)


def on_config(config):
    """mkdocs': the recipes come into the navigation, and headings get the names that GitHub gives them."""
    from pymdownx.slugs import slugify

    config.mdx_configs.setdefault("toc", {})["slugify"] = slugify(case="lower")
    recipes = [page for page in pages_of(ROOT).values() if page.startswith("recipes/")]
    for section in config.nav:
        if "Recipes" in section:
            section["Recipes"] = recipes
    return config


def on_files(files, config):
    """mkdocs': adds what lies outside its folder."""
    from mkdocs.structure.files import File

    for source, page in pages_of(ROOT).items():
        if not source.startswith("docs/"):
            files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown, page, config, files):
    """mkdocs': turns the links of a page."""
    pages = pages_of(ROOT)
    source = next(source for source, uri in pages.items() if uri == page.file.src_uri)
    return for_the_site(markdown, source, pages)
