"""
The site of these pages (`make docs`): README, recipes and CHANGELOG become pages too, and links go on between them.

In the repository every link is that of a file, as GitHub follows it; here each becomes that of the page which that
file has become. What is no page, such as a test, keeps its words and loses its link. The reference is a page of the
site alone, made of docstrings.
"""

import ast
import posixpath
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]

LINK = re.compile(r"(?<!`)\[([^\]]*)\]\(([^)#\s:]+)(#[^)\s]*)?\)")

# What the docstrings of the trainers' configs name for the rest of their options.
OPTIONS = [
    "llava_mod_hf.training.batch_options.BatchOptions",
    "llava_mod_hf.training.validation_options.ValidationOptions",
    "llava_mod_hf.training.lora_options.LoraOptions",
    "llava_mod_hf.training.hub_options.HubOptions",
    "llava_mod_hf.training.vision_options.VisionOptions",
]

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


def public_names(root):
    """
    The public names of the package, and where each is defined, without its import.

    Args:
        root (`Path`): the repository.

    Returns:
        `dict[str, str]`: name → dotted path.
    """
    tree = ast.parse((root / "src" / "llava_mod_hf" / "__init__.py").read_text(encoding="utf-8"))
    found = {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            found |= {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Assign) and node.targets[0].id == "_LAZY":
            lazy = ast.literal_eval(node.value)
            found |= {name: f"llava_mod_hf.{module}.{name}" for name, module in lazy.items()}
    return found


def reference_page(root):
    """
    The reference: trainers with their options first, then the model, then what makes and moves students.

    Args:
        root (`Path`): the repository.

    Returns:
        `str`: Markdown, in which mkdocstrings puts each docstring in its place.
    """
    names = public_names(root)
    training = [name for name in names if name.endswith(("Config", "Trainer")) and not name.startswith("Llava")]
    sections = {
        "Training": [names[name] for name in training],
        "Options that they share": OPTIONS,
        "The model": [path for name, path in names.items() if name.startswith("Llava")],
        "Functions": [path for name, path in names.items() if name not in training and not name.startswith("Llava")],
    }
    lines = ["# Reference", "", "What `from llava_mod_hf import …` gives, by its docstrings."]
    for title, paths in sections.items():
        lines += ["", f"## {title}", "", *(f"::: {path}\n" for path in paths)]
    return "\n".join(lines)


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
    files.append(File.generated(config, "reference.md", content=reference_page(ROOT)))
    return files


def on_page_markdown(markdown, page, config, files):
    """mkdocs': turns the links of a page."""
    pages = pages_of(ROOT)
    source = next((source for source, uri in pages.items() if uri == page.file.src_uri), None)
    if source is None:
        return markdown
    return for_the_site(markdown, source, pages)
