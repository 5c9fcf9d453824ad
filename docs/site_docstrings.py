"""
Docstrings as Markdown, for the site's reference.

They are written as those of transformers: a name, its type in backticks, and what it is, which Markdown already reads.
Of the sections, lists are made; a name between brackets and backticks, which GitHub would not link either, is code.
"""

import re
import textwrap

import griffe

SECTION = re.compile(r"^(Args|Returns|Raises):\s*$", re.MULTILINE)
NAME = re.compile(r"\[`~?(?:[\w.]+\.)?(\w+)`\]")


def _items(body):
    """Of a section's text, what begins at its left edge: a name and all that is indented below it."""
    items = []
    for line in textwrap.dedent(body).strip("\n").splitlines():
        if line and not line[0].isspace():
            items.append([line])
        elif items:
            items[-1].append(line)
    return [" ".join(textwrap.dedent("\n".join(item)).split()) for item in items]


def markdown_of(docstring):
    """
    A docstring whose sections are lists.

    Args:
        docstring (`str`): its text, without the indentation.

    Returns:
        `str`: Markdown.
    """
    text, *sections = SECTION.split(NAME.sub(r"`\1`", docstring))
    parts = [text.strip()]
    for title, body in zip(sections[::2], sections[1::2], strict=True):
        # a section ends at the first line that is not indented
        lines = body.splitlines()
        end = next((i for i, line in enumerate(lines) if line and not line[0].isspace()), len(lines))
        items = _items("\n".join(lines[:end]))
        if title == "Returns":
            items = [" ".join(items)]
        if title == "Args":
            items = [re.sub(r"^(\w+(?:, \w+)*)", r"**\1**", item) for item in items]
        parts.append(f"*{title}*")
        parts.append("\n".join(f"- {item}" for item in items))
        parts.append("\n".join(lines[end:]).strip())
    return "\n\n".join(part for part in parts if part)


class Docstrings(griffe.Extension):
    """griffe's: turns each docstring that it has read."""

    def on_instance(self, *, obj, **kwargs):
        """Turns that of an object."""
        if obj.docstring and not obj.is_alias:
            obj.docstring.value = markdown_of(obj.docstring.value)
