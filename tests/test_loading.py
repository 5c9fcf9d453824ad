"""Models that a command would take by their name, and should not."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_mod_cli import main
from llava_mod_hf.loading import load_model_and_processor

COMMANDS = {
    "evaluate": ["--dataset_name", "embedded:easy-vqa", "--dataset_config", "questions", "--max_samples", "4"],
    "publish": ["--output_dir", "published"],
    "mimic": ["--output_dir", "run", "--teacher", "embedded:tiny-teacher", "--dataset_name", "embedded:easy-vqa",
              "--dataset_config", "mixture", "--max_samples", "4", "--use_cpu", "true"],
}  # fmt: skip
MODEL = {"evaluate": "--model", "publish": "--checkpoint", "mimic": "--student"}
RESULTS = {"student": {"exact_match": 0.5}, "teacher": None, "blind": None, "dataset": "x", "expert_load": {}}


@pytest.mark.parametrize("command", COMMANDS)
def test_weights_that_are_not_finite_are_refused_by_name(
    make_student, processor, tmp_path, monkeypatch, capsys, command
):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "model"
    make_student(moe_layers=[]).save_pretrained(folder)
    processor.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    broken = "model.multi_modal_projector.linear_1.weight"
    weights[broken][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "run.json").write_text(json.dumps({"stage": "mimic_dense", "recipe": {}, "log_history": []}))
    (folder / "results.json").write_text(json.dumps(RESULTS))

    assert main([command, MODEL[command], str(folder), *COMMANDS[command]]) == 2
    assert f"weights with values that are not finite, `{broken}` among them" in capsys.readouterr().err
    assert not (tmp_path / "published").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"attn_implementation": "flash_attention_2"}, r"`attn_implementation` is `flash_attention_2`, which needs a"),
        ({"device": "cuda:7"}, r"`embedded:tiny-teacher` cannot be put on the device `cuda:7`"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="has an accelerator")
def test_what_this_machine_lacks_is_said_by_the_option_that_asks_for_it(options, told):
    with pytest.raises(ValueError, match=told):
        load_model_and_processor("embedded:tiny-teacher", **options)
