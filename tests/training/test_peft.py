"""Fine-tuning a downloaded student: LoRA on attention, experts and routers, and the recipes for stock TRL."""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import DatasetMixtureConfig, DPOConfig, ModelConfig, ScriptArguments, SFTConfig, TrlParser, get_peft_config

from helpers.models import sharpen
from llava_mod_hf import LlavaModForConditionalGeneration
from llava_mod_hf.data.easy_vqa import image_paths
from llava_mod_hf.loading import load_model_and_processor
from llava_mod_hf.publishing.checks import check_publishable
from llava_mod_hf.recipes import check_recipe

FOLDER = Path(__file__).parents[2] / "recipes" / "finetune"
TRL_OPTIONS = (ScriptArguments, ModelConfig, DatasetMixtureConfig)
CONFIGS = {"sft": SFTConfig, "dpo": DPOConfig, "sft_lora": SFTConfig}
PARTS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight")
# Somebody without the package: an adapter's folder loads as a model, and answers the same.
LOAD_ADAPTER = """
import sys
sys.modules["llava_mod_hf"] = None
import torch
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText
folder, inputs, output = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
with torch.no_grad():
    save_file({"logits": model(input_ids=torch.load(inputs, weights_only=True)).logits}, output)
"""


def run(argv, root, **kwargs):
    environment = {"HF_MODULES_CACHE": str(root / "modules"), "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    process = subprocess.run(
        [sys.executable, *map(str, argv)],
        env={**os.environ, **environment, "ACCELERATE_USE_CPU": "true"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        **kwargs,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    return process.stdout


@pytest.fixture(scope="module")
def student_folder(make_student, processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("student")
    sharpen(make_student(text_model_type="qwen2")).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def input_ids():
    return torch.randint(8, 300, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def trained(student_folder, input_ids):
    """A student with the recipe's adapter after a few steps, its weights before, and its logits."""
    student = LlavaModForConditionalGeneration.from_pretrained(student_folder)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    model = get_peft_model(student, recipe_lora())
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=1.0)
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=input_ids, labels=input_ids, output_router_logits=True).loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        return model, before, model(input_ids=input_ids).logits


def recipe_lora():
    """The adapter that `sft_lora.yaml` describes, as TRL makes it."""
    parser = TrlParser((*TRL_OPTIONS, SFTConfig))
    options = ["--config", str(FOLDER / "sft_lora.yaml"), "--use_cpu", "true", "--lora_r", "4"]
    return get_peft_config(parser.parse_args_and_config(options)[1])


def logits_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def logits_of(model, input_ids):
    with torch.no_grad():
        return model.eval()(input_ids=input_ids).logits


# The adapter


def test_the_adapter_changes_what_the_model_says(trained, student_folder, input_ids):
    _, _, logits = trained
    dense = logits_of(LlavaModForConditionalGeneration.from_pretrained(student_folder), input_ids)
    assert (logits - dense).abs().max() > 0.05 * dense.abs().max()


@pytest.mark.parametrize("how", ["peft", "auto class"])
def test_a_saved_adapter_loads_and_says_the_same(trained, student_folder, input_ids, tmp_path, how):
    model, _, logits = trained
    model.save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors", ".json", ".md"}
    if how == "peft":
        student = AutoModelForImageTextToText.from_pretrained(student_folder)
        loaded = PeftModel.from_pretrained(student, tmp_path)
    else:
        loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    logits_close(logits_of(loaded, input_ids), logits)


def test_an_adapter_loads_without_the_package(trained, input_ids, tmp_path):
    model, _, logits = trained
    model.save_pretrained(tmp_path / "adapter")
    torch.save(input_ids, tmp_path / "inputs.pt")
    run(
        ["-P", "-c", LOAD_ADAPTER, tmp_path / "adapter", tmp_path / "inputs.pt", tmp_path / "out.safetensors"], tmp_path
    )
    logits_close(load_file(tmp_path / "out.safetensors")["logits"], logits)


def test_merged_it_is_a_student_again_in_which_every_targeted_part_has_changed(
    trained, student_folder, input_ids, tmp_path
):
    model, before, logits = trained
    model.save_pretrained(tmp_path / "adapter")
    student = AutoModelForImageTextToText.from_pretrained(student_folder)
    merged = PeftModel.from_pretrained(student, tmp_path / "adapter").merge_and_unload()
    logits_close(logits_of(merged, input_ids), logits)
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    logits_close(logits_of(loaded, input_ids), logits)

    after = loaded.state_dict()
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    for part in PARTS:
        # layer 1 has a dense FFN, which the recipe leaves alone
        layers = (0, 2) if part.startswith("mlp") else (0, 1, 2)
        expected = {name for name in before if "language_model" in name and part in name and "bias" not in name}
        assert len(expected) == len(layers)
        assert expected <= changed
    assert all("language_model" in name and ("self_attn" in name or ".mlp." in name) for name in changed)
    for name in changed:
        if "experts" in name:  # each expert by itself
            assert all(not torch.equal(old, new) for old, new in zip(before[name], after[name], strict=True))


def test_the_readme_merges_into_a_folder_that_is_whole(trained, student_folder, input_ids, tmp_path, monkeypatch):
    """Its lines as they stand, on an adapter and a student of these names: with a processor, ready to be shared."""
    model, _, logits = trained
    (example,) = re.findall(r"```python\n(.*?)```", (FOLDER / "README.md").read_text(), re.DOTALL)
    model.save_pretrained(tmp_path / "runs" / "finetune" / "sft_lora")
    shutil.copytree(student_folder, tmp_path / "you" / "student")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(example, names)
    merged = Path("runs", "finetune", "merged")
    loaded, processor = load_model_and_processor(str(merged))
    assert processor.tokenizer.get_vocab() == AutoProcessor.from_pretrained(student_folder).tokenizer.get_vocab()
    for same in (loaded, names["model"], names["merged"]):
        logits_close(logits_of(same, input_ids), logits)
    assert {"modeling_llava_mod.py", "model.safetensors"} <= {path.name for path in check_publishable(merged)}


def test_dropout_on_experts_is_refused_by_peft(student_folder):
    config = LoraConfig(lora_dropout=0.1, target_parameters=["mlp.experts.down_proj"], target_modules=[])
    with pytest.raises(ValueError, match="lora_dropout"):
        get_peft_model(LlavaModForConditionalGeneration.from_pretrained(student_folder), config)


# Stock TRL


@pytest.mark.parametrize("name", CONFIGS)
def test_every_key_of_a_recipe_is_an_option_of_trl(name):
    check_recipe(FOLDER / f"{name}.yaml", (*TRL_OPTIONS, CONFIGS[name]))


def commands():
    """The README's commands by the name of their recipe."""
    text = (FOLDER / "README.md").read_text()
    lines = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)[0].splitlines()
    return {Path(words[3]).stem: words for words in map(shlex.split, lines)}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Rows in TRL's formats, as the data sets of the recipes have them."""
    root = tmp_path_factory.mktemp("data")
    messages = [{"role": Value("string"), "content": Value("string")}]
    image = {"path": None, "bytes": Path(image_paths("test")[0]).read_bytes()}
    rows = [
        {
            "images": [image],
            "prompt": [{"role": "user", "content": "is there a red circle?"}],
            "completion": [{"role": "assistant", "content": answers[0]}],
            "chosen": [{"role": "assistant", "content": answers[0]}],
            "rejected": [{"role": "assistant", "content": answers[1]}],
        }
        for answers in (("yes", "no"), ("no", "a blue one"))
    ]
    for folder, columns in (("sft", ("prompt", "completion")), ("dpo", ("prompt", "chosen", "rejected"))):
        (root / folder).mkdir()
        features = Features({"images": List(ImageFeature()), **dict.fromkeys(columns, messages)})
        chosen = [{"images": row["images"], **{column: row[column] for column in columns}} for row in rows]
        Dataset.from_list(chosen, features=features).to_parquet(root / folder / "train.parquet")
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft_lora", "sft", "dpo"])
def test_stock_trl_runs_a_recipe_as_the_readme_says(name, student_folder, data, tmp_path):
    words = commands()[name]
    changed = {
        "model_name_or_path": student_folder,
        "dataset_name": data / words[1],
        "output_dir": tmp_path / "out",
        "max_steps": 2,  # the first is warm-up, with a learning rate of 0
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "logging_steps": 1,
        "use_cpu": True,
    }
    options = [part for key, value in changed.items() for part in (f"--{key}", value)]
    stdout = run(["-m", "trl.cli.main", *words[1:], *options], tmp_path, cwd=FOLDER.parents[1])
    line, *_ = [line for line in stdout.splitlines() if line.startswith("{") and "'aux_loss'" in line]
    logs = ast.literal_eval(line)
    # 1 per expert and choice at perfect balance: a bit more than top_k
    assert 2 - 1e-2 <= float(logs["aux_loss"]) < 4
    assert float(logs["grad_norm"]) > 0

    saved = {path.name for path in (tmp_path / "out").iterdir()}
    if name == "sft_lora":
        assert "adapter_model.safetensors" in saved
        adapter = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert adapter["base_model_name_or_path"] == str(student_folder)
        lora = load_file(tmp_path / "out" / "adapter_model.safetensors")
        recipe = yaml.safe_load((FOLDER / "sft_lora.yaml").read_text())
        assert recipe["lora_r"] == adapter["r"]
        moved = {key.split(".lora_B")[0] for key, value in lora.items() if ".lora_B" in key and value.any()}
        assert {"gate", "experts", "base_layer", "q_proj", "v_proj"} <= {key.split(".")[-1] for key in moved}
    else:
        assert {"modeling_llava_mod.py", "configuration_llava_mod.py", "model.safetensors"} <= saved
        before, after = (load_file(folder / "model.safetensors") for folder in (student_folder, tmp_path / "out"))
        assert before.keys() == after.keys()
        assert all(
            any(not torch.equal(before[key], after[key]) for key in before if part in key)
            for part in ("self_attn", "experts", "gate.weight", "multi_modal_projector")
        )
