"""docs/faq.md: what it tells users to type is what the command line takes."""

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from llava_mod_cli import commands
from llava_mod_hf import recipes
from llava_mod_hf.commands.check import _parser, stage_of

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "faq.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", TEXT, flags=re.DOTALL)
LINES = [line for block in BLOCKS for line in block.replace("\\\n", "").splitlines()]


def options_of(name):
    """Names of a command's options, or of those that `check` has beside a stage's."""
    if name == "check":
        return {option.lstrip("-") for action in _parser()._actions for option in action.option_strings}
    return {field.name for group in commands()[name].groups() for field in fields(group)}


@pytest.mark.parametrize("line", LINES)
def test_a_command_is_read_as_the_command_line_reads_it(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    program, name, *argv = shlex.split(line)
    assert program == "llava-mod"
    command = commands()[name]
    if name == "check":
        own, argv = _parser().parse_known_args(argv)
        command = commands()[stage_of(own.config)]
        argv = ["--config", own.config, *argv]
    elif command.positional and not argv[0].startswith("-"):
        argv = [f"--{command.positional}", *argv]
    recipes.parse(command.groups(), [*argv, "--use_cpu", "true"] if "--config" in argv else argv)


def test_options_and_commands_in_the_text_are_there():
    prose = re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL)
    known = {name: options_of(name) for name in commands()}
    words = set().union(*known.values())
    spans = re.findall(r"`([^`]+)`", prose)
    flags = {flag for span in spans for flag in re.findall(r"--([\w-]+)", span)}
    assert flags >= {"kl_weight", "bad_rows", "form", "license", "models"} and flags <= words
    keys = {span.partition(":")[0] for span in spans if re.fullmatch(r"[a-z]+(_[a-z]+)+(: \w+)?", span)}
    assert keys >= {"on_policy_share", "use_peft", "save_strategy", "trust_remote_code"} and keys <= words
    assert {span for span in spans if "-" in span and span in known} >= {"cache-teacher"}


def test_every_question_is_answered_in_a_few_lines():
    questions = re.findall(r"^### (.+)\n\n((?:(?!#).*\n?)*)", TEXT, re.MULTILINE)
    assert len(questions) > 20
    for question, answer in questions:
        prose = re.sub(r"```.*?```", "", answer, flags=re.DOTALL).split("\n")
        assert 0 < sum(bool(line) for line in prose) <= 6, question
        assert "](" in answer or "```bash" in answer, question
