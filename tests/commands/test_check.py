"""`llava-mod check`: what a stage would find out later, found out before."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import yaml
from PIL import Image

from llava_mod_cli import main
from llava_mod_hf.commands.check import stage_of
from llava_mod_hf.loading import resolve
from llava_mod_hf.students.build import build_student, plan_student

ROOT = Path(__file__).parents[2]

MODELS = {"vision_tower": "embedded:scenes-vision-tower", "language_model": "embedded:scenes-student-lm"}


@pytest.fixture
def folder(tmp_path):
    """Four rows of LLaVA's format, with their pictures, and a recipe of the first stage."""
    rows = []
    for number in range(4):
        Image.new("RGB", (70 + number, 64), "red").save(tmp_path / f"{number}.png")
        said = [
            {"from": "human", "value": "<image>\nwhat is this?"},
            {"from": "gpt", "value": " ".join(["a red square"] * (number + 1))},
        ]
        rows.append({"id": number, "image": f"{number}.png", "conversations": said})
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return tmp_path


def recipe(folder, name="1_adapt.yaml", **options):
    values = {
        **MODELS, "dataset_name": str(folder / "rows.json"), "output_dir": str(folder / "out"), "max_length": 64,
        "per_device_train_batch_size": 2, "num_train_epochs": 3, "save_strategy": "no", "bf16": True,
    }  # fmt: skip
    values = {name: value for name, value in {**values, **options}.items() if value is not None}
    (folder / name).write_text(yaml.safe_dump(values))
    return str(folder / name)


def mimic(folder, **options):
    made = {
        "student": str(folder / "out"),
        "teacher": "embedded:scenes-teacher",
        "output_dir": str(folder / "distilled"),
    }
    recipe(folder)
    return recipe(folder, "2_mimic.yaml", **{**dict.fromkeys(MODELS), **made, **options})


def check(path, *options, capsys):
    """`(exit code, findings, text)`."""
    output = Path(path).parent / "found.json"
    code = main(["check", "--config", path, "--output", str(output), *options])
    return code, json.loads(output.read_text()), capsys.readouterr().out


def test_a_stage_that_is_ready(folder, capsys):
    code, found, text = check(recipe(folder), "--processes", "2", capsys=capsys)
    assert (code, found["ready"], found["to_mend"]) == (0, True, [])
    assert text.endswith("\nready\n")
    assert found["stage"] == "adapt"
    assert found["data"]["rows"] == 4 and found["data"]["pictures_opened"] == 4
    (file,) = found["data"]["files"]
    assert file["bytes"] == (folder / "rows.json").stat().st_size and len(file["sha256"]) == 64
    assert (found["steps"]["steps"], found["steps"]["rows_per_step"]) == (3, 4)
    tokens = found["rows"]["tokens"]
    # the last row's answer is three times the first's and more
    assert tokens["most"] - tokens["least"] == 9
    assert found["steps"]["tokens"] == pytest.approx(3 * (4 * tokens["least"] + 3 + 6 + 9))
    assert "<image × 16>" in found["rows"]["first"] and "⟦a red square<|end|>⟧" in found["rows"]["first"]
    assert not (folder / "out").exists()
    assert logging.getLogger("llava_mod_hf").level == logging.NOTSET


def test_batches_of_tokens(folder, capsys):
    budget = {"max_tokens_per_batch": 80, "train_sampling_strategy": "group_by_length"}
    path = recipe(folder, per_device_train_batch_size=None, **budget)
    _, found, text = check(path, "--processes", "2", capsys=capsys)
    lengths = found["rows"]["tokens"]
    assert 2 * lengths["most"] <= 80 < 3 * lengths["least"], "two rows of four at a time"
    assert (found["steps"]["steps"], found["steps"]["rows_per_step"]) == (3, 4)
    assert "of batches of up to 2 rows and 80 tokens are padding" in text
    _, rows_found, _ = check(recipe(folder), "--processes", "2", capsys=capsys)
    assert found["memory"]["whole"] > rows_found["memory"]["whole"], "of 80 tokens, not of twice the longest row"


def test_the_counts_are_those_of_the_student(folder, capsys):
    student, _ = build_student(*MODELS.values())
    _, found, _ = check(recipe(folder), capsys=capsys)
    adaptor = sum(p.numel() for p in student.model.multi_modal_projector.parameters())
    assert found["parameters"] == {
        "total": student.num_parameters(), "active": student.num_parameters(), "trained": adaptor,
    }  # fmt: skip
    _, found, _ = check(mimic(folder, moe_layers=["alternate"]), capsys=capsys)
    assert found["parameters"]["total"] > found["parameters"]["active"] > student.num_parameters()


def test_a_planned_student_is_the_one_that_is_built():
    planned, processor = plan_student(*MODELS.values())
    built, expected = build_student(*MODELS.values())
    assert {name: p.shape for name, p in planned.named_parameters()} == {
        name: p.shape for name, p in built.named_parameters()
    }
    assert all(p.is_meta for p in planned.parameters())
    for name in ("image_token_index", "image_seq_length", "vision_feature_layer", "vision_feature_select_strategy"):
        assert getattr(planned.config, name) == getattr(built.config, name)
    assert processor.to_dict() == expected.to_dict()
    assert processor.tokenizer.get_vocab() == expected.tokenizer.get_vocab()


def test_a_student_that_earlier_recipes_will_make(folder, capsys):
    path = mimic(folder, moe_layers=["alternate"])
    code, found, text = check(path, capsys=capsys)
    assert code == 0 and found["student"] == {"planned": True}
    assert "which earlier recipes here will make" in text
    assert found["teacher"]["same_tokenizer"] and found["teacher"]["unaligned"] == 0
    later = recipe(folder, "3_mimic.yaml", **dict.fromkeys(MODELS), student=str(folder / "distilled"),
                   teacher="embedded:scenes-teacher", output_dir=str(folder / "later"))  # fmt: skip
    _, again, _ = check(later, capsys=capsys)
    assert again["parameters"]["total"] == found["parameters"]["total"], "the experts are of the recipe before"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"max_length": 20}, "None of the 4 rows can be trained on: 4 longer than `max_length`"),
        ({"dataset_name": "nowhere.json"}, "The data file `nowhere.json` does not exist"),
        ({"language_model": "embedded:none"}, "There is no model `embedded:none`"),
        ({"report_to": "comet_ml"}, "comet"),
        ({"train_modules": None, "use_peft": True}, "`use_peft` is true, and this stage makes the student"),
    ],
    ids=["long", "data", "model", "logger", "adapter"],
)
def test_what_is_to_be_mended(folder, capsys, options, told):
    code, found, text = check(recipe(folder, **options), capsys=capsys)
    assert code == 1 and not found["ready"]
    assert any(told in problem for problem in found["to_mend"]), found["to_mend"]
    assert "\nto mend:\n1. " in text and "ready" not in text


def test_rows_that_do_not_fit_are_counted(folder, capsys):
    _, whole, _ = check(recipe(folder), capsys=capsys)
    code, found, text = check(recipe(folder, max_length=whole["rows"]["tokens"]["most"] - 1), capsys=capsys)
    assert code == 0
    assert (found["rows"]["trained"], found["rows"]["left_out"]) == (3, 1)
    assert "1 are left out: too long" in text


def test_a_broken_picture_is_named(folder, capsys):
    data = (folder / "2.png").read_bytes()
    (folder / "2.png").write_bytes(data[: len(data) // 2])
    code, found, _ = check(recipe(folder), capsys=capsys)
    assert code == 1
    assert any("row 2 (" in problem or "Row 2" in problem for problem in found["to_mend"]), found["to_mend"]


def test_only_some_pictures_are_opened_unless_all_are_asked_for(folder, capsys, monkeypatch):
    monkeypatch.setattr("llava_mod_hf.commands.check_stage.PICTURES", 2)
    _, found, _ = check(recipe(folder), capsys=capsys)
    assert found["data"]["pictures_opened"] == 2
    _, found, _ = check(recipe(folder), "--all", capsys=capsys)
    assert found["data"]["pictures_opened"] == 4


def test_a_teacher_of_another_tokenizer(folder, capsys):
    code, found, _ = check(mimic(folder, teacher="embedded:tiny-teacher"), capsys=capsys)
    assert code == 1
    assert any("tokenizers of teacher and student differ" in problem for problem in found["to_mend"])


def test_a_disk_and_a_gpu_that_are_too_small(folder, capsys, monkeypatch):
    path = recipe(folder, save_strategy="steps", save_steps=1, save_total_limit=1)
    code, found, _ = check(path, "--gpu-memory", "1", capsys=capsys)
    assert code == 0 and found["disk"]["checkpoints"] == 2
    total, trained = found["parameters"]["total"], found["parameters"]["trained"]
    assert found["disk"]["bytes"] == 2 * (4 * total + 8 * trained) + 4 * total
    code, found, _ = check(path, "--gpu-memory", "0.001", capsys=capsys)
    assert code == 1 and "GB of each GPU at least, and there are 0.001" in found["to_mend"][0]
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 9, 1))
    code, found, _ = check(path, capsys=capsys)
    assert code == 1 and "Checkpoints take" in found["to_mend"][0]


def test_what_a_cache_of_image_features_takes(folder, capsys, monkeypatch):
    rows = json.loads((folder / "rows.json").read_text())
    rows[3]["image"] = "0.png"
    (folder / "rows.json").write_text(json.dumps(rows))
    cache = folder / "features"
    code, found, text = check(recipe(folder, vision_cache=str(cache)), capsys=capsys)
    student, _ = build_student(*MODELS.values())
    width = student.config.vision_config.hidden_size
    assert (code, found["features"]["pictures"], found["features"]["bytes"]) == (0, 3, 3 * 16 * width * 2)
    assert f"3 pictures of {16 * width * 2 / 1000:.1f} kB: " in text and not cache.exists()
    code, found, _ = check(mimic(folder, vision_cache=str(cache)), capsys=capsys)
    assert (code, found["features"]["bytes"]) == (0, 3 * 16 * width * 2), "the teacher has the same encoder"
    code, found, _ = check(mimic(folder, vision_cache=str(cache), use_peft=True), capsys=capsys)
    assert code == 0
    monkeypatch.setattr("llava_mod_hf.teachers.vision_cache.RESERVE", 2**60)
    code, found, _ = check(recipe(folder, vision_cache=str(cache)), capsys=capsys)
    assert code == 1 and "`vision_cache` takes" in found["to_mend"][0]
    code, found, _ = check(recipe(folder), capsys=capsys)
    assert code == 0 and "features" not in found


def test_the_stage_is_told_by_the_recipe(folder):
    names = ("1_adapt", "2_mimic_dense", "3_mimic_sparse", "4_prefer")
    told = [stage_of(str(ROOT / "recipes" / "scenes" / f"{name}.yaml")) for name in names]
    assert told == ["adapt", "mimic", "mimic", "prefer"]
    either = recipe(folder, "stage.yaml", **dict.fromkeys(MODELS), student="a", teacher="b")
    with pytest.raises(ValueError, match="may be one of mimic, prefer: say which by `--stage`"):
        stage_of(either)
    unknown = recipe(folder, learning_rat=1.0)
    with pytest.raises(ValueError, match="unknown key `learning_rat`: did you mean `learning_rate`"):
        stage_of(unknown)


def test_an_option_of_the_stage_overrides_the_recipe(folder, capsys):
    _, found, _ = check(recipe(folder), "--num_train_epochs", "6", capsys=capsys)
    assert found["steps"]["steps"] == 12


def test_a_student_that_is_no_llava(folder, capsys):
    code, found, _ = check(mimic(folder, student="embedded:scenes-student-lm"), capsys=capsys)
    assert code == 1 and "student `embedded:scenes-student-lm` could not be loaded" in found["to_mend"][0]


def test_rows_of_evaluation_that_do_not_fit(folder, capsys):
    rows = json.loads((folder / "rows.json").read_text())
    rows[0]["conversations"][1]["value"] = "a red square " * 40
    (folder / "eval.json").write_text(json.dumps(rows[:1]))
    path = recipe(folder, eval_dataset_name=str(folder / "eval.json"), eval_strategy="steps")
    code, found, _ = check(path, capsys=capsys)
    assert found["data"]["eval_rows"] == 1
    assert code == 1 and "None of the 1 rows can be trained on: 1 longer" in found["to_mend"][0]


def test_pictures_of_evaluation_that_are_trained_on(folder, capsys):
    rows = json.loads((folder / "rows.json").read_text())
    Image.new("RGB", (64, 64), "blue").save(folder / "other.png")
    other = {**rows[0], "image": "other.png"}
    (folder / "eval.json").write_text(json.dumps([rows[0], rows[0], rows[2], other]))
    path = recipe(folder, eval_dataset_name=str(folder / "eval.json"), eval_strategy="steps")
    _, found, text = check(path, capsys=capsys)
    assert found["data"].items() >= {"eval_rows": 4, "eval_pictures": 3, "eval_pictures_trained": 2}.items()
    assert "2 of their 3 pictures are trained on too" in text
    (folder / "eval.json").write_text(json.dumps([other]))
    _, found, _ = check(path, capsys=capsys)
    assert found["data"]["eval_pictures_trained"] == 0
    assert "eval_pictures" not in check(recipe(folder), capsys=capsys)[1]["data"]


def test_of_a_stream_the_first_rows_are_read(folder, capsys, monkeypatch):
    monkeypatch.setattr("llava_mod_hf.commands.check_stage.STREAMED", 3)
    path = recipe(folder, streaming=True, max_steps=5)
    code, found, text = check(path, capsys=capsys)
    assert (code, found["rows"]["trained"], found["steps"]["steps"]) == (0, 3, 5)
    assert "the first 3 rows stand for the rest" in text
    code, found, _ = check(path, "--max_steps", "-1", capsys=capsys)
    assert code == 1 and "give `max_steps`" in found["to_mend"][0]


def test_models_of_a_folder_by_their_names(folder, capsys):
    for name in MODELS.values():
        shutil.copytree(resolve(name), folder / "models" / "you" / name.removeprefix("embedded:"))
    path = recipe(folder, **{part: f"you/{name.removeprefix('embedded:')}" for part, name in MODELS.items()})
    assert check(path, "--models", str(folder / "models"), capsys=capsys)[0] == 0
    assert check(path, capsys=capsys)[0] == 1


@pytest.mark.parametrize("argv", [[], ["--config", "none.yaml"], ["--config", "none.yaml", "--processes", "0"]])
def test_bad_input_is_a_sentence(argv, capsys):
    assert main(["check", *argv]) == 2
    said = capsys.readouterr().err
    assert said.startswith("llava-mod check: ") and said.count("\n") == 1


def test_no_weights_are_read(folder, capsys, monkeypatch):
    from safetensors import torch as files

    def refuse(*args, **kwargs):
        raise AssertionError("weights are read")

    monkeypatch.setattr(files, "load_file", refuse)
    monkeypatch.setattr("transformers.modeling_utils.safe_open", refuse)
    code, found, _ = check(mimic(folder), capsys=capsys)
    assert code == 0, found["to_mend"]
