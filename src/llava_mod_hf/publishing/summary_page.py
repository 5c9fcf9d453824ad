"""The page that a quickstart is summed up in, and what makes pages: one file, which needs nothing else."""

import base64
from pathlib import Path

from jinja2 import Environment, StrictUndefined

TEMPLATE = Path(__file__).with_name("summary.html.j2")


def data_uri(png):
    """`str`: a PNG within a page."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def write_page(path, said, picture, dark_picture):
    """
    Writes the page.

    Args:
        path (`Path`): HTML file to write.
        said (`dict`): what `summary.html.j2` tells.
        picture (`Path`), dark_picture (`bytes`): PNGs, for light and dark screens.

    Raises:
        jinja2.UndefinedError: if `said` lacks what the template names.
    """
    pictures = {"light": data_uri(picture.read_bytes()), "dark": data_uri(dark_picture)}
    fill_template(TEMPLATE, path, pictures=pictures, **said)


def fill_template(template, path, **said):
    """
    Writes a page of a template of HTML, whatever characters the words have.

    Args:
        template (`Path`), path (`Path`): to read, and to write.
        said: what the template names, all of it.

    Raises:
        jinja2.UndefinedError: if something is missing.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(template.read_text(encoding="utf-8"))
    path.write_text(page.render(**said) + "\n", encoding="utf-8")
