"""
The fast tests under the lowest or the newest transformers that the package allows, unless that is the one installed;
other options are pytest's.

    python tests/versions/suite.py lowest|newest [OPTION ...]
"""

import importlib.metadata
import os
import re
import subprocess
import sys

from packaging.requirements import Requirement
from releases import ROOT, install, released

ENDS = {"newest": 0, "lowest": -1}


def allowed(name):
    """The range of versions of a library that `pyproject.toml` allows."""
    return str(Requirement(re.search(rf'"({name}\b[^"]*)"', (ROOT / "pyproject.toml").read_text())[1]).specifier)


def main(end, *options):
    version = released(allowed("transformers"))[ENDS[end]]
    installed = importlib.metadata.version("transformers") == version
    said = ": installed, so `make test` runs it" if installed else ""
    sys.stdout.write(f"transformers {version}, the {end} of {allowed('transformers')}{said}\n")
    sys.stdout.flush()
    if installed:
        return
    path = os.pathsep.join([*map(str, install(version)), os.environ.get("PYTHONPATH", "")])
    tests = subprocess.run([sys.executable, "-m", "pytest", *options], cwd=ROOT, env={**os.environ, "PYTHONPATH": path})
    raise SystemExit(tests.returncode)


if __name__ == "__main__":
    main(*sys.argv[1:])
