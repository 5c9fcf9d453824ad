"""
transformers' own common model tests over our model classes; options are pytest's.

    PYTHONPATH=tests python tests/conventions/run.py [OPTION ...]

The tests are no part of the wheel of transformers: they are taken from the source distribution of the installed
version, which has the common ones alone. What those import of the others is written here, with nothing in it.
"""

import importlib.metadata
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from versions.releases import ROOT, install_into, pip

FOLDER = ROOT / ".venv" / "conventions"
PACKAGE = "transformers_tests"

STAND_INS = {
    "__init__.py": "",
    "exporters/test_export.py": "class ExportTesterMixin: ...\n",
    "generation/test_utils.py": "class GenerationTesterMixin: ...\n",
    "utils/test_configuration_utils.py": "config_common_kwargs = {}\n",  # read for configs without sub-configs
}


def fetch(version):
    """The folder whose package `transformers_tests` is the common tests of a version, downloaded once."""
    folder = FOLDER / version
    if (folder / PACKAGE).is_dir():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        pip("download", "--no-deps", "--no-binary", "transformers", "--dest", temporary, f"transformers=={version}")
        (archive,) = Path(temporary).glob("*.tar.gz")
        tests = Path(temporary) / PACKAGE
        tests.mkdir()
        with tarfile.open(archive) as members:
            for member in members:
                path = Path(member.name)
                if member.isfile() and path.parts[1:-1] == ("tests",):
                    (tests / path.name).write_bytes(members.extractfile(member).read())
        for name, text in STAND_INS.items():
            (tests / name).parent.mkdir(exist_ok=True)
            (tests / name).write_text(text)
        tests.rename(folder / PACKAGE)
    return folder


def main(*options):
    libraries = FOLDER / "libraries"
    install_into(libraries, "--no-deps", "parameterized==0.9.0")
    folder = fetch(importlib.metadata.version("transformers"))
    path = os.pathsep.join(map(str, [folder, libraries, os.environ.get("PYTHONPATH", "")]))
    shown = ["-W", "default", "--disable-warnings", "-o", "verbosity_subtests=0"]  # some tests look for a warning
    command = [sys.executable, "-m", "pytest", *shown, *options, "tests/conventions/suite.py"]
    raise SystemExit(subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}).returncode)


if __name__ == "__main__":
    main(*sys.argv[1:])
