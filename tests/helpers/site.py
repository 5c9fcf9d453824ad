"""The pages as a site, built as `make docs` does."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def build_site(folder):
    """
    Builds it, or skips a test where mkdocs is not installed; in the targets that promise it, that fails.

    Args:
        folder (`Path`): where it goes.

    Returns:
        `dict[str, Path]`: the pages by their folders.
    """
    for name in ("mkdocs", "mkdocstrings"):
        if importlib.util.find_spec(name) is None:
            promised = os.environ.get("LLAVA_MOD_TARGET") == "docs" or os.environ.get("NEEDS_BROWSER")
            (pytest.fail if promised else pytest.skip)(f"{name}: `make test-docs`")
    argv = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    process = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return {path.parent.relative_to(folder).as_posix(): path for path in folder.rglob("index.html")}
