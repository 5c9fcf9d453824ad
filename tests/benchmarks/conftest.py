"""The benchmarks are scripts beside each other, not a package."""

import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

sys.path.insert(0, str(BENCHMARKS))


def check_shape(text):
    """What every benchmark's JSON is: a command, a machine, and rows with ranges, and no path of this machine."""
    found = json.loads(text)
    assert found.keys() == {"benchmark", "command", "machine", "rows"}
    assert (
        found["command"].startswith(f"python benchmarks/{found['benchmark']}.py") and "--json" not in found["command"]
    )
    assert {"cpu", "cores", "load", "torch", "transformers", "trl", "device", "dtype"} <= found["machine"].keys()
    assert found["machine"]["torch"] == torch.__version__ and found["machine"]["cores"] > 0
    assert re.findall(r"[\"' =]/\w[^\"]*", text) == []
    keys = [(row["name"], row.get("curve"), row.get("x")) for row in found["rows"]]
    assert len(keys) == len(set(keys)) > 0
    for row in found["rows"]:
        assert {"name", "value", "unit", "low", "high", "ratios"} <= row.keys() and row["unit"]
        for each in (row, *row["ratios"].values()):
            assert 0 <= each["low"] <= each["value"] <= each["high"] < float("inf"), row
        assert row["name"] not in row["ratios"]
    return found


@pytest.fixture
def measure(monkeypatch, tmp_path):
    """Runs `python benchmarks/NAME.py OPTIONS --json FILE` in this process, and gives what is in the file."""
    threads = torch.get_num_threads()

    def run(name, options):
        path = tmp_path / "found.json"
        words = [*shlex.split(options), "--json", str(path)]
        monkeypatch.setattr("sys.argv", [str(BENCHMARKS / f"{name}.py"), *words])
        importlib.import_module(name).main()
        return check_shape(path.read_text(encoding="utf-8"))

    yield run
    torch.set_num_threads(threads)
