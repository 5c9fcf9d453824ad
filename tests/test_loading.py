"""Models that a command would take by their name, and should not."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from llava_mod_cli import main
from llava_mod_hf.loading import load_model_and_processor, load_whole

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
        ({"device": "mps"}, r"`embedded:tiny-teacher` cannot be put on the device `mps` .*: give one that is here"),
    ],
)
@pytest.mark.skipif(torch.accelerator.is_available(), reason="has an accelerator")
def test_what_this_machine_lacks_is_said_by_the_option_that_asks_for_it(options, told):
    with pytest.raises(ValueError, match=told):
        load_model_and_processor("embedded:tiny-teacher", **options)


class Fails:
    """An Auto class that raises an error."""

    def __init__(self, error):
        self.error = error

    def from_pretrained(self, path, **kwargs):
        raise self.error


ORDINAL = torch.AcceleratorError("CUDA error: invalid device ordinal\nCompile with `TORCH_USE_CUDA_DSA`.")
MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            ORDINAL,
            r"cannot be put on the device `cuda:7` \(CUDA error: invalid device ordinal.*\): give one that is here",
        ),
        (MEMORY, r"has no room on the device `cuda:7` \(CUDA out of memory.*\): give a larger or an emptier one"),
    ],
)
def test_a_device_is_not_told_as_a_file_that_is_cut_off(monkeypatch, error, told):
    with pytest.raises(type(error)):
        load_whole(Fails(error), "somewhere")
    monkeypatch.setattr("llava_mod_hf.loading.AutoModelForImageTextToText", Fails(error))
    with pytest.raises(ValueError, match=told):
        load_model_and_processor("embedded:tiny-teacher", device="cuda:7")
    with pytest.raises(ValueError if error is MEMORY else type(error), match=r"has no room \(|ordinal"):
        load_model_and_processor("embedded:tiny-teacher")


@pytest.mark.parametrize("content", [b"", b"<html>Please log in</html>", b"PK\x03\x04half a checkpoint"])
def test_weights_of_pytorch_that_are_cut_off_are_told_as_such(tmp_path, content):
    LlamaConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=1, vocab_size=8).save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(ValueError, match="are cut off or of another model"):
        load_whole(AutoModelForCausalLM, tmp_path)
