"""The files that ship: a checkpoint loads, trains and is saved again where this package is not installed."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from safetensors.torch import load_file

import llava_mod_hf
from helpers.models import sharpen
from llava_mod_hf.data.easy_vqa import image_paths
from llava_mod_hf.publishing import fresh_process

MODEL = Path(llava_mod_hf.__file__).parent / "model"
SHIPPED = {"configuration_llava_mod", "modeling_llava_mod", "moe_llava_mod"}
QUESTION = {"image": image_paths("test")[0], "question": "is there a red circle?"}
# What somebody without the package does: load, answer, save again, load that.
SCRIPT = """
import json, runpy, sys
sys.modules["llava_mod_hf"] = None
fresh_process, folder, questions, output, resaved, report = sys.argv[1:]
runpy.run_path(fresh_process)["main"](folder, questions, output)

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor
remote = {"trust_remote_code": True}
model = AutoModelForImageTextToText.from_pretrained(folder, **remote)
model.save_pretrained(resaved)
AutoProcessor.from_pretrained(folder).save_pretrained(resaved)
runpy.run_path(fresh_process)["main"](resaved, questions, output + ".resaved")
AutoModel.from_pretrained(folder, **remote).save_pretrained(resaved + "-base")
base = AutoModel.from_pretrained(resaved + "-base", **remote)
modules = [type(model).__module__, type(base).__module__, type(AutoConfig.from_pretrained(folder, **remote)).__module__]
with open(report, "w") as file:
    json.dump({"modules": modules, "path": [m for m in sys.modules if m.startswith("llava_mod_hf.")]}, file)
"""


@pytest.fixture(scope="module")
def student(make_student):
    return sharpen(make_student())


@pytest.fixture(scope="module")
def folder(student, processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("student")
    student.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def elsewhere(folder, tmp_path_factory):
    """The folder in which a fresh process without the package leaves what it found."""
    output = tmp_path_factory.mktemp("elsewhere")
    (output / "questions.json").write_text(json.dumps([QUESTION, {**QUESTION, "question": "what color is it?"}]))
    names = ("questions.json", "logits.safetensors", "resaved", "report.json")
    process = run(
        ["-P", "-c", SCRIPT, fresh_process.__file__, folder, *(output / name for name in names)],
        cwd=output,
        modules=output / "modules",
    )
    (output / "stdout.txt").write_text(process.stdout)
    return output


def run(argv, *, cwd, modules):
    process = subprocess.run(
        [sys.executable, *map(str, argv)],
        cwd=cwd,
        env={**os.environ, "HF_MODULES_CACHE": str(modules), "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    return process


def expected_outputs(student, processor):
    inputs = processor.apply_chat_template(
        fresh_process.conversation(QUESTION),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        return student(**inputs).logits, student.model(**inputs).last_hidden_state


@pytest.mark.parametrize("name", ["logits.safetensors", "logits.safetensors.resaved"])
def test_logits_are_the_same_without_the_package(elsewhere, student, processor, name):
    found = load_file(elsewhere / name)
    logits, hidden = expected_outputs(student, processor)
    assert logits.abs().max() > 1  # logits next to 0 would hide any difference
    torch.testing.assert_close(found["logits"], logits, rtol=0, atol=1e-5 * logits.abs().max().item())
    torch.testing.assert_close(found["hidden"], hidden, rtol=0, atol=1e-5 * hidden.abs().max().item())


def test_the_classes_come_from_the_checkpoint(elsewhere):
    report = json.loads((elsewhere / "report.json").read_text())
    assert [module.split(".")[0] for module in report["modules"]] == ["transformers_modules"] * 3
    assert report["path"] == []


def test_the_pipeline_answers(elsewhere):
    decoder = json.JSONDecoder()
    text = (elsewhere / "stdout.txt").read_text()
    first, end = decoder.raw_decode(text)
    second, _ = decoder.raw_decode(text[end:])
    assert first == second
    assert first["model_type"] == "llava_mod"
    assert len(first["answers"]) == 2
    assert all(isinstance(answer, str) and answer for answer in first["answers"])


@pytest.mark.parametrize("name", ["resaved", "resaved-base"])
def test_saved_again_it_still_has_its_code(elsewhere, folder, name):
    code = {path.name: path.read_text() for path in folder.glob("*.py")}
    assert code == {f"{module}.py": (MODEL / f"{module}.py").read_text() for module in SHIPPED}
    assert {path.name: path.read_text() for path in (elsewhere / name).glob("*.py")} == code
    auto_map, resaved_map = (
        json.loads((saved / "config.json").read_text())["auto_map"] for saved in (folder, elsewhere / name)
    )
    assert resaved_map == auto_map
    assert set(auto_map) == {"AutoConfig", "AutoModel", "AutoModelForImageTextToText"}


# Stock TRL


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """Standard output of `trl sft` on the checkpoint, and the folder that it writes."""
    root = tmp_path_factory.mktemp("trl")
    messages = [{"role": Value("string"), "content": Value("string")}]
    features = Features({"images": List(ImageFeature()), "prompt": messages, "completion": messages})
    rows = [
        {
            "images": [{"path": None, "bytes": Path(QUESTION["image"]).read_bytes()}],
            "prompt": [{"role": "user", "content": QUESTION["question"]}],
            "completion": [{"role": "assistant", "content": answer}],
        }
        for answer in ("yes", "no")
    ]
    (root / "data").mkdir()
    Dataset.from_list(rows, features=features).to_parquet(root / "data" / "train.parquet")
    recipe = {
        "model_name_or_path": str(folder),
        "trust_remote_code": True,
        "dtype": "float32",
        "dataset_name": str(root / "data"),
        "output_dir": str(root / "out"),
        "per_device_train_batch_size": 2,
        "max_steps": 1,
        "learning_rate": 1.0e-3,
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "report_to": "none",
        "num_processes": 1,
        "model_init_kwargs": {"output_router_logits": True},
    }
    (root / "sft.yaml").write_text(yaml.safe_dump(recipe))
    process = run(["-m", "trl.cli.main", "sft", "--config", root / "sft.yaml"], cwd=root, modules=root / "modules")
    return process.stdout, root / "out"


def test_stock_trl_trains_a_checkpoint_with_its_router_loss(trained, student):
    stdout, out = trained
    (line,) = [line for line in stdout.splitlines() if line.startswith("{") and "'aux_loss'" in line]
    logs = ast.literal_eval(line)
    # 1 per expert and choice at perfect balance: a bit more than top_k
    assert 2 - 1e-3 <= float(logs["aux_loss"]) < 4
    assert float(logs["grad_norm"]) > 0
    before, after = student.state_dict(), load_file(out / "model.safetensors")
    prefix = "model.language_model.layers.2.mlp."
    assert not torch.equal(before[prefix + "gate.weight"], after[prefix + "gate.weight"])
    # in the file each expert has its own
    stored = torch.stack([after[f"{prefix}experts.{expert}.down_proj.weight"] for expert in range(4)])
    assert not torch.equal(before[prefix + "experts.down_proj"], stored)
    assert {path.name for path in out.glob("*.py")} == {f"{module}.py" for module in SHIPPED}
