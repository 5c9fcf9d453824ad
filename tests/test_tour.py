"""docs/tour.md from its first block to its last."""

import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from llava_mod_cli import commands, main
from llava_mod_hf import recipes

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "tour.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


LINES = [line for block in blocks("bash") for line in block.replace("\\\n", "").splitlines()]


def words_of(line):
    """What is piped into a line's command, and its words."""
    piped, _, command = line.rpartition("|")
    words = shlex.split(command)
    assert words[0] == "llava-mod"
    return " ".join(shlex.split(piped)[1:]) + "\n" if piped else "", words[1:]


def test_every_command_of_the_page_is_known_and_reads_what_is_there():
    there = {"embedded:scenes-teacher"}
    for line in LINES:
        _, (command, *argv) = words_of(line)
        if command == "report":
            assert set(argv[:2]) <= there
            continue
        known = commands()[command]
        given = [] if known.positional is None else [f"--{known.positional}"]
        groups = recipes.parse(known.groups(), [*given, *argv])
        values = {name: value for group in groups for name, value in vars(group).items()}
        read = {values.get(name) for name in ("student", "model", "teacher", "checkpoint")} - {None}
        assert read <= there, line
        there.add(values.get("output_dir"))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_page_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    for name in ("docs", "recipes"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    said = ""
    for line in LINES:
        piped, argv = words_of(line)
        monkeypatch.setattr(sys, "stdin", io.StringIO(piped))
        assert main(argv) == 0, (line, capsys.readouterr().err)
        said += capsys.readouterr().out
    for block in blocks("text"):
        assert block in said
    first, last = re.search(r"`kl` falls from (\d\.\d+) to (\d\.\d+)", TEXT).groups()
    history = json.loads(Path("runs/tour/mimic/run.json").read_text())["log_history"]
    kl = [log["kl"] for log in history if "kl" in log]
    assert [kl[0], kl[-1]] == pytest.approx([float(first), float(last)], abs=0.02)
    results = json.loads(Path("runs/tour/mimic/results.json").read_text())
    shown = [100 * results[who]["exact_match"] for who in ("student", "teacher", "blind")]
    told = re.findall(r"(\d\d\.\d)(?: %|\.)", re.search(r"Of 300 test questions(.*?)All", TEXT, re.DOTALL)[1])
    assert shown == pytest.approx([float(value) for value in told], abs=1.5)  # the last bits differ by processor
    assert Path("runs/tour/report/report.html").is_file()
    (code,) = blocks("python")
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""}
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("a ")
