"""What a saved student does where nobody says how: it decodes with a cache, and says no token that no answer holds."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForImageTextToText

from helpers.models import image_batch
from llava_mod_hf import MimicConfig, MimicTrainer, PreferenceConfig, PreferenceTrainer, build_student, upcycle
from llava_mod_hf.data import easy_vqa
from llava_mod_hf.students.generation import never_said, prepare_generation
from llava_mod_hf.training.adapt_config import AdaptConfig
from llava_mod_hf.training.adapt_trainer import AdaptTrainer

SPECIAL = ["<|pad|>", "<image>", "<|system|>", "<|user|>", "<|assistant|>"]
ARGUMENTS = {"max_steps": 1, "per_device_train_batch_size": 2, "use_cpu": True, "report_to": "none", "bf16": False}
# What somebody without the package does; the language model's calls are counted.
STEPS = """
import json, sys
sys.modules["llava_mod_hf"] = None
import torch
from transformers import AutoModelForImageTextToText
for folder in sys.argv[1:]:
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    lengths = []
    model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    model.generate(input_ids=torch.tensor([[5, 6, 7, 8]]), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    print(json.dumps(lengths))
"""


def train(kind, student, teacher, processor, folder):
    rows = easy_vqa.load("questions", "train").select(range(2))
    arguments = {**ARGUMENTS, "output_dir": str(folder)}
    common = {"train_dataset": rows, "processing_class": processor}
    if kind == "adapt":
        trainer = AdaptTrainer(student, AdaptConfig(**arguments), **common)
    elif kind == "mimic":
        trainer = MimicTrainer(student, teacher, MimicConfig(**arguments), **common)
    else:
        common["train_dataset"] = easy_vqa.load("preferences", "train").select(range(2))
        trainer = PreferenceTrainer(student, teacher, PreferenceConfig(**arguments, loss_type="sigmoid"), **common)
    trainer.train()
    trainer.save_model(folder)


@pytest.mark.slow
def test_a_trained_student_decodes_one_token_a_step_elsewhere(make_student, processor, tmp_path):
    folders = [tmp_path / kind for kind in ("adapt", "mimic", "prefer")]
    for folder in folders:
        train(folder.name, make_student(), make_student(seed=1), processor, folder)
        assert json.loads((folder / "config.json").read_text())["use_cache"] is True
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, "-c", STEPS, *folders], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [json.loads(line) for line in done.stdout.splitlines()] == [[4, 1, 1, 1]] * len(folders)


@pytest.mark.parametrize("name", ["tiny-teacher", "tiny-student-lm"])
def test_the_embedded_models_decode_with_a_cache(name):
    folder = easy_vqa.__file__.replace("data/easy_vqa.py", f"weights/{name}")
    for file in ("config.json", "generation_config.json"):
        with open(f"{folder}/{file}") as stored:
            assert '"use_cache": false' not in stored.read()


def test_what_no_answer_holds(processor):
    assert processor.tokenizer.convert_ids_to_tokens(never_said(processor)) == SPECIAL


def test_what_ends_a_turn_is_said(processor, monkeypatch):
    template = "{% for m in messages %}<|user|>{{ m.content[0].text }}<|system|>{% endfor %}"
    monkeypatch.setattr(processor, "chat_template", template)
    said = processor.tokenizer.convert_ids_to_tokens(never_said(processor))
    assert said == [token for token in SPECIAL if token != "<|system|>"]


@torch.no_grad()
def test_sampling_never_draws_what_no_answer_holds(make_student, processor, tmp_path):
    student = make_student()
    student.lm_head = torch.nn.Linear(32, student.config.text_config.vocab_size)
    student.lm_head.weight.zero_()
    student.lm_head.bias.zero_()
    ids = processor.tokenizer.convert_tokens_to_ids(SPECIAL)
    student.lm_head.bias[ids] = 8.0  # all but certain to be drawn
    batch = image_batch(processor, ["is there a red circle?", "what is it?"])
    options = {"do_sample": True, "temperature": 1.3, "top_k": 0, "max_new_tokens": 16}
    torch.manual_seed(0)
    drawn = student.generate(**batch, **options, use_cache=True)[:, batch["input_ids"].shape[1] :]
    assert torch.isin(drawn, torch.tensor(ids)).float().mean() > 0.9
    prepare_generation(student, processor)
    found = student.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
    assert not torch.isin(found[found != processor.tokenizer.pad_token_id], torch.tensor(ids)).any()


def test_built_upcycled_and_reloaded_students_keep_it(tmp_path):
    student, processor = build_student("embedded:tiny-teacher", "embedded:tiny-student-lm")
    sparse = upcycle(student)
    sparse.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    for model in (student, sparse, loaded):
        assert model.generation_config.suppress_tokens == never_said(processor)
        assert model.generation_config.use_cache is True
        assert getattr(model.config, "use_cache", True)


def test_a_generation_config_that_somebody_wrote_keeps_its_settings(make_student, processor):
    student = make_student()
    student.generation_config.temperature, student.generation_config.suppress_tokens = 0.3, [7]
    student.generation_config._from_model_config, student.generation_config.use_cache = False, False
    prepare_generation(student, processor)
    config = student.generation_config
    assert (config.temperature, config.use_cache) == (0.3, False)
    assert config.suppress_tokens == sorted([7, *never_said(processor)])
