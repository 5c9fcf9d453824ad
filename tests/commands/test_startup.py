"""`llava-mod` answers at once: its own help imports nothing, and that of a stage neither trainers nor data."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import llava_mod_cli

SOURCE = Path(llava_mod_cli.__file__).parent


def in_a_process(code):
    """What `code` gives `found`, in a process that has imported nothing yet."""
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "HF_HUB_OFFLINE": "1"}
    process = subprocess.run(
        [sys.executable, "-c", f"import json, sys\n{code}\nsys.stderr.write(json.dumps(found))"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stderr.splitlines()[-1])


@pytest.mark.parametrize(("argv", "code"), [(["--help"], 0), (["mimc", "--config", "recipe.yaml"], 2)])
def test_help_and_a_mistyped_command_import_neither_torch_nor_the_package(argv, code):
    found = in_a_process(
        f"""
import llava_mod_cli
sys.stderr.write(str(llava_mod_cli.main({argv})) + "\\n")
found = [name for name in ("torch", "transformers", "trl", "numpy", "yaml", "llava_mod_hf") if name in sys.modules]
"""
    )
    assert found == []
    assert llava_mod_cli.main(argv) == code


@pytest.mark.slow
@pytest.mark.parametrize(("own", "expected"), [(None, True), ("", False)])
def test_without_a_terminal_the_libraries_draw_no_bars(own, expected, monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    if own is not None:
        monkeypatch.setenv("TQDM_DISABLE", own)
    code = """
import contextlib, llava_mod_cli
with contextlib.suppress(SystemExit):
    llava_mod_cli.main(["info", "--help"])
from tqdm.auto import tqdm
found = tqdm([]).disable
"""
    assert in_a_process(code) is expected


def test_a_stage_lists_its_options_without_trainers_and_data_and_the_package_gives_its_names():
    found = in_a_process(
        """
import llava_mod_cli, llava_mod_hf
from transformers import AutoModelForImageTextToText, CONFIG_MAPPING
from llava_mod_hf import recipes
known = llava_mod_cli.commands()
options = [group.__name__ for name in ("adapt", "mimic", "prefer") for group in known[name].groups()]
heavy = ("datasets", "pandas", "trl.trainer.sft_trainer", "trl.trainer.dpo_trainer", "transformers.trainer")
config = CONFIG_MAPPING["llava_mod"]
found = {
    "options": options,
    "imported": [name for name in heavy if name in sys.modules],
    "registered": [config.__name__, AutoModelForImageTextToText._model_mapping[config].__name__],
    "missing": [name for name in llava_mod_hf.__all__ if getattr(llava_mod_hf, name).__name__ != name],
}
"""
    )
    assert {"AdaptConfig", "MimicConfig", "PreferenceConfig", "DataArguments"} <= set(found["options"])
    assert found["imported"] == []
    assert found["registered"] == ["LlavaModConfig", "LlavaModForConditionalGeneration"]
    assert found["missing"] == []


def test_what_neither_trains_nor_reads_rows_loads_nothing_for_it():
    found = in_a_process(
        """
import importlib, llava_mod_cli
known = llava_mod_cli.commands()
for name in ("info", "convert", "export", "compress", "upcycle", "publish", "report", "chat", "demo"):
    known[name].groups()
    importlib.import_module(known[name].module)
heavy = ("datasets", "pandas", "evaluate", "trl.trainer.sft_trainer", "transformers.trainer")
found = [name for name in heavy if name in sys.modules]
"""
    )
    assert found == []


def test_a_new_command_is_one_file(tmp_path, monkeypatch, capsys):
    (tmp_path / "measure_twice.py").write_text(
        '"""`llava-mod measure-twice`: then cut."""\n\nOPTIONS = ("a:B", "c:D")\n'
    )
    (tmp_path / "arguments.py").write_text('"""Groups of options."""\n')
    monkeypatch.setattr(llava_mod_cli, "FOLDER", tmp_path)
    command = llava_mod_cli.Command(
        "measure-twice", "then cut", "llava_mod_hf.commands.measure_twice", ("a:B", "c:D"), None
    )
    assert llava_mod_cli.commands() == {"measure-twice": command}
    assert llava_mod_cli.main([]) == 0
    assert "  measure-twice         then cut\n" in capsys.readouterr().out


def test_a_command_is_named_as_its_file():
    known = llava_mod_cli.commands()
    assert {name.replace("-", "_") for name in known} == {command.module.split(".")[-1] for command in known.values()}
