"""The page that a run is summed up in: one file, which needs nothing else."""

import base64
from pathlib import Path

from jinja2 import Environment, StrictUndefined

TEMPLATE = Path(__file__).with_name("summary.html.j2")


def _data_uri(png):
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
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    pictures = {"light": _data_uri(picture.read_bytes()), "dark": _data_uri(dark_picture)}
    path.write_text(template.render(pictures=pictures, **said) + "\n", encoding="utf-8")
