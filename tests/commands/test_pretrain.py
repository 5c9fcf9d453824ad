"""The recipes that regenerate the embedded weights run, one step each, in the order of `make weights`."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from llava_mod_cli import main
from llava_mod_hf import load_model_and_processor
from llava_mod_hf.commands.pretrain import PretrainConfig, labelled_pictures
from llava_mod_hf.data import easy_vqa, scene_rows, scenes

ROOT = Path(__file__).parents[2]


def pretrain(recipe, folder, *more):
    argv = ["--config", str(ROOT / "recipes" / "tiny" / f"0_{recipe}.yaml"), "--output_dir", str(folder)]
    short = ["--max_steps", "1", "--per_device_train_batch_size", "4", "--bf16", "false"]
    assert main(["pretrain", *argv, *short, *more]) == 0


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    root = tmp_path_factory.mktemp("weights")
    with pytest.MonkeyPatch.context() as patch:
        # preparing all rows takes a minute, and one step reads four
        for name in ("load", "load_text"):
            whole = getattr(easy_vqa, name)
            patch.setattr(easy_vqa, name, lambda *args, whole=whole: whole(*args).select(range(64)))
        for recipe in ("vision_tower", "student_lm", "teacher_lm"):
            pretrain(recipe, root / recipe)
        parts = ["--vision_tower", str(root / "vision_tower"), "--language_model", str(root / "teacher_lm")]
        pretrain("teacher", root / "teacher", *parts)
    return root


@pytest.mark.parametrize(("made", "shipped"), [("teacher", "tiny-teacher"), ("student_lm", "tiny-student-lm")])
def test_the_recipes_make_what_is_shipped(weights, made, shipped):
    folder = ROOT / "src" / "llava_mod_hf" / "weights" / shipped
    for name in ("config.json", "tokenizer.json"):
        found, expected = (json.loads((each / name).read_text()) for each in (weights / made, folder))
        for values in (found, expected):  # made by the installed release
            values.pop("transformers_version", None)
        assert found == expected
    assert (weights / made / "chat_template.jinja").read_text() == (folder / "chat_template.jinja").read_text()
    sizes = {path: path.stat().st_size for path in (weights / made / "model.safetensors", folder / "model.safetensors")}
    assert len(set(sizes.values())) == 1, sizes


def test_the_teacher_starts_from_the_pretrained_tower(weights):
    teacher, processor = load_model_and_processor(str(weights / "teacher"))
    assert teacher.config.moe_layers == []
    assert processor.image_processor.size["height"] == teacher.config.vision_config.image_size


def test_make_weights_runs_these_recipes_in_this_order():
    order = re.search(r"for part in (.*?);", (ROOT / "Makefile").read_text())[1].split()
    assert order == ["vision_tower", "student_lm", "teacher_lm", "teacher"]
    assert {f"0_{part}.yaml" for part in order} == {path.name for path in (ROOT / "recipes/tiny").glob("0_*.yaml")}


def pretrain_scenes(recipe, folder, *more):
    argv = ["--config", str(ROOT / "recipes" / "scenes" / f"0_{recipe}.yaml"), "--output_dir", str(folder)]
    short = ["--max_steps", "1", "--per_device_train_batch_size", "4", "--warmup_steps", "0"]
    short += ["--world_options", '{"rows": 8}']
    assert main(["pretrain", *argv, *short, *more]) == 0


def test_the_teacher_of_the_scenes_keeps_its_encoder(tmp_path):
    for recipe in ("vision_tower", "teacher_lm"):
        pretrain_scenes(recipe, tmp_path / recipe)
    parts = ["--vision_tower", str(tmp_path / "vision_tower"), "--language_model", str(tmp_path / "teacher_lm")]
    for name, more in (("frozen", []), ("trained", ["--train_vision_tower", "true"])):
        pretrain_scenes("teacher", tmp_path / name, *parts, *more)
    tower = AutoModel.from_pretrained(tmp_path / "vision_tower").state_dict()

    def moved(name):
        teacher, _ = load_model_and_processor(str(tmp_path / name))
        found = teacher.model.vision_tower.state_dict()
        return [key for key in tower if not torch.equal(tower[key], found[key])]

    assert moved("frozen") == []
    assert len(moved("trained")) > 10


def test_every_word_of_the_scenes_is_a_token():
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "src/llava_mod_hf/weights/scenes-student-lm")
    for text in scenes.words():
        words = re.findall(r"\w+|[^\w\s]", text)
        assert [token.strip("Ġ") for token in tokenizer.tokenize(text)] == words


def test_an_unknown_world_is_told(tmp_path, capsys):
    argv = ["--config", str(ROOT / "recipes/scenes/0_teacher.yaml"), "--output_dir", str(tmp_path / "t")]
    with pytest.raises(SystemExit):
        main(["pretrain", *argv, "--world", "none"])
    assert "--world" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"world": "none"}, "`world` is 'none': give one of easy-vqa, scenes."),
        ({"part": "student"}, "`part` is 'student': give one of vision_tower, language_model, teacher."),
        ({"world_options": {"rows": 4}}, "`world_options` are of `scenes`, and `world` is `easy-vqa`: leave them out."),
        ({"world": "easy-vqa", "world_options": '{"rows": 4}'}, "`world_options` are of `scenes`"),
    ],
)
def test_a_value_that_no_part_reads_is_told(tmp_path, values, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        PretrainConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **values)


def test_a_bad_option_of_the_world_is_told_before_anything_is_written(tmp_path, capsys):
    argv = ["--config", str(ROOT / "recipes/scenes/0_student_lm.yaml"), "--output_dir", str(tmp_path / "lm")]
    assert main(["pretrain", *argv, "--world_options", '{"rows": 8, "colour": 1}']) == 2
    assert "has no option `colour`: its options are rows, first_row, skew" in capsys.readouterr().err
    assert not (tmp_path / "lm").exists()


def test_a_picture_is_labelled_with_every_kind_that_its_caption_names(tmp_path):
    args = PretrainConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, part="vision_tower", world="scenes",
        world_options={"rows": 40, "wrong_answers": 0.5}, seed=3,
    )  # fmt: skip
    rows, count = labelled_pictures(args)
    assert count == 12
    captions = scene_rows.load("describe", "train", 3, {"rows": 40, "wrong_answers": 0.5})["answer"]
    for label, caption in zip(rows["label"], captions, strict=True):
        assert label == [float(kind in caption) for kind in scenes.KINDS]
