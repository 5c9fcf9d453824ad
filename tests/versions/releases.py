"""Releases of transformers, as the package index lists them, each installed in a folder of its own."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".venv" / "versions"
NEEDED = ("huggingface-hub", "tokenizers")  # what transformers binds to a range, beside what all versions take


def pip(*arguments):
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {done.stderr[-2000:]}")
    return done.stdout


def released(specifier):
    """The newest patch of every minor version that a specifier such as `>=5.0` allows, newest first."""
    listed = re.search(r"Available versions: (.*)", pip("index", "versions", "transformers"))[1]
    newest = {}
    for version in sorted(map(Version, listed.split(", "))):
        if version in SpecifierSet(specifier):
            newest[version.release[:2]] = version
    return [str(version) for version in sorted(newest.values(), reverse=True)]


def install_into(folder, *arguments):
    """A folder of that name is complete: pip writes beside it."""
    if not folder.is_dir():
        partial = folder.with_name(folder.name + ".part")
        shutil.rmtree(partial, ignore_errors=True)
        pip("install", "--quiet", "--no-compile", "--target", partial, *arguments)
        partial.rename(folder)


def install(version):
    """Paths that make a process import that transformers, with the libraries that it asks for."""
    target = FOLDER / version
    install_into(target, "--no-deps", f"transformers=={version}")
    (distribution,) = importlib.metadata.distributions(name="transformers", path=[str(target)])
    asked = [Requirement(text) for text in distribution.requires]
    asked = [part for part in asked if part.name in NEEDED and part.marker is None]
    if all(part.specifier.contains(importlib.metadata.version(part.name)) for part in asked):
        return [target]
    libraries = FOLDER / re.sub(r"\W+", "-", " ".join(sorted(map(str, asked))))
    install_into(libraries, *asked)
    return [target, libraries]
