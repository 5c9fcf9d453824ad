"""What the trainers train when they are used in Python, without the stages of the command line."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    CONFIG_MAPPING,
    AutoModelForImageTextToText,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from helpers.ddp_gradients import RUN, mimic_trainer, raw_gradients, rows, text_rows
from helpers.preference_trainers import preference_trainer
from llava_mod_hf.training.adapt_config import AdaptConfig
from llava_mod_hf.training.adapt_trainer import AdaptTrainer
from llava_mod_hf.training.trainable import set_trainable, train_only

KINDS = ("adapt", "mimic", "prefer")
LORA = {"r": 2, "target_modules": r".*language_model.*\.(q_proj|v_proj)"}


def text_pairs():
    return rows("preferences").map(lambda row: {"images": []})


@pytest.fixture
def trainer_of(make_student, processor, tmp_path):
    """`trainer_of(kind, student, **arguments)`: a trainer that a Python user makes; the defaults are the class's."""

    def make(kind, student, **args):
        args = {"train_modules": None, **args}
        if kind == "adapt":
            dataset = args.pop("dataset", None) or rows()
            own = {name: args.pop(name) for name in ("peft_config",) if name in args}
            args = AdaptConfig(output_dir=str(tmp_path), per_device_train_batch_size=4, **{**RUN, **args})
            return AdaptTrainer(student, args, train_dataset=dataset, processing_class=processor, **own)
        make_trainer = mimic_trainer if kind == "mimic" else preference_trainer
        return make_trainer(student, make_student(moe_layers=[], seed=1), processor, tmp_path, **args)

    return make


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def names_with(model, *parts):
    return {name for name, _ in model.named_parameters() if any(part in name for part in parts)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("moe_layers", "part"), [((), "language_model"), ((0, 2), "mlp")], ids=["dense", "sparse"])
def test_left_out_it_is_the_default_of_the_stage(make_student, trainer_of, kind, moe_layers, part):
    student = make_student(moe_layers=moe_layers)
    found = raw_gradients(trainer_of(kind, student))
    expected = names_with(student, "multi_modal_projector")
    if kind != "adapt":
        expected |= {name for name in names_with(student, "language_model") if part in name}
    assert trained(student) == expected
    assert found.keys() <= expected


@pytest.mark.parametrize("kind", KINDS)
def test_the_named_parts_are_trained(make_student, trainer_of, kind):
    student = make_student()
    trainer_of(kind, student, train_modules=["ffn"])
    assert trained(student) == {name for name in names_with(student, "language_model") if ".mlp." in name}
    student = make_student()
    trainer_of(kind, student, train_modules=["vision_tower", "adaptor", "language_model"])
    assert trained(student) == names_with(student, "")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_frozen_stays_frozen(make_student, trainer_of, kind):
    student = make_student()
    student.model.multi_modal_projector.linear_1.requires_grad_(False)
    trainer_of(kind, student, train_modules=["adaptor"])
    assert trained(student) == names_with(student, "multi_modal_projector.linear_2")
    student.model.multi_modal_projector.requires_grad_(False)
    with pytest.raises(ValueError, match=r"Nothing is left to train.*\['adaptor'\].*requires_grad"):
        trainer_of(kind, student, train_modules=["adaptor"])


def test_what_another_trainer_froze_is_free_again(make_student, trainer_of):
    student = make_student(moe_layers=[])
    trainer_of("adapt", student)
    assert trained(student) == names_with(student, "multi_modal_projector")
    trainer_of("mimic", student)
    assert trained(student) == names_with(student, "multi_modal_projector", "language_model")
    set_trainable(student, ["adaptor"])  # the caller's own word, which stays
    trainer_of("mimic", student)
    assert trained(student) == names_with(student, "multi_modal_projector")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("given", ["peft_config", "adapted model"])
def test_of_an_adapted_student_the_adapter_alone(make_student, trainer_of, kind, given):
    student, args = make_student(), {"peft_config": LoraConfig(**LORA)}
    if given == "adapted model":
        student, args = get_peft_model(student, LoraConfig(**LORA)), {}
    model = trainer_of(kind, student, **args).model
    assert trained(model)
    assert all("lora_" in name for name in trained(model))


def test_an_adapter_after_a_trainer_is_alone_as_well(make_student, trainer_of):
    student = make_student()
    trainer_of("adapt", student)
    model = trainer_of("mimic", get_peft_model(student, LoraConfig(**LORA))).model
    assert all("lora_" in name for name in trained(model))


def test_of_an_adapted_student_the_named_part_of_the_adapter(make_student, trainer_of):
    lora = {**LORA, "modules_to_save": ["multi_modal_projector"]}
    model = get_peft_model(make_student(), LoraConfig(**lora))
    trainer_of("mimic", model, train_modules=["adaptor"])
    assert trained(model) == names_with(model, "modules_to_save.default")
    assert trained(model)
    with pytest.raises(ValueError, match=r"Nothing is left to train.*adapter"):
        trainer_of("mimic", get_peft_model(make_student(), LoraConfig(**LORA)), train_modules=["vision_tower"])


@pytest.mark.parametrize("given", ["peft_config", "adapted model"])
def test_the_reference_of_an_adapted_student_does_not_unfreeze_its_adapter(make_student, processor, tmp_path, given):
    student = make_student()
    args = {"peft_config": LoraConfig(**LORA, modules_to_save=["multi_modal_projector"])}
    if given == "adapted model":
        student, args = get_peft_model(student, args["peft_config"]), {}
    args = {"reference": "self", "train_modules": ["adaptor"], **args}
    trainer = preference_trainer(student, None, processor, tmp_path, **args)
    before = trained(trainer.model)
    assert raw_gradients(trainer).keys() == before == trained(trainer.model)
    assert before == names_with(trainer.model, "modules_to_save.default")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("modules", [["experts"], ["adaptor", "everything"], [], "adaptor"])
def test_unknown_parts_are_refused_by_the_config(make_student, trainer_of, kind, modules):
    with pytest.raises(ValueError, match=r"`train_modules` is .* vision_tower, adaptor, language_model, ffn"):
        trainer_of(kind, make_student(), train_modules=modules)


# Students that are not ours


def stock_llava(make_student):
    config = make_student(moe_layers=[]).config
    names = ("vision_config", "text_config", "image_token_index", "image_seq_length")
    names += ("vision_feature_layer", "vision_feature_select_strategy")
    return LlavaForConditionalGeneration(LlavaConfig(**{name: getattr(config, name) for name in names}))


@pytest.mark.parametrize("kind", KINDS)
def test_a_stock_llava_has_the_same_parts(make_student, trainer_of, kind):
    student = stock_llava(make_student)
    trainer_of(kind, student)
    expected = ("multi_modal_projector",) if kind == "adapt" else ("multi_modal_projector", "language_model", "lm_head")
    assert trained(student) == names_with(student, *expected)


def tiny(model_type, **options):
    config = CONFIG_MAPPING[model_type](**options)
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


def test_a_model_of_other_names_has_the_same_parts():
    model = tiny("smolvlm")
    train_only(model, None)
    assert trained(model) == names_with(model, "connector", "text_model", "lm_head")


def test_a_model_without_the_part_is_refused():
    model = tiny("qwen2_5_vl")
    with pytest.raises(ValueError, match=r"`adaptor` is to be trained, and Qwen2_5_VLForConditionalGeneration.*visual"):
        train_only(model, None)
    train_only(model, ["language_model"])
    assert trained(model) == names_with(model, "language_model", "lm_head")
    with torch.device("meta"), pytest.raises(ValueError, match="LlamaForCausalLM has no such part"):
        train_only(LlamaForCausalLM(LlamaConfig(num_hidden_layers=1)), None)


# Batches that reach nothing of what is trained


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_text_alone_has_a_gradient_of_zero(make_student, trainer_of, kind):
    student = make_student()
    dataset = text_pairs() if kind == "prefer" else text_rows()
    found = raw_gradients(trainer_of(kind, student, dataset=dataset, train_modules=["adaptor"]))
    assert found.keys() == names_with(student, "multi_modal_projector")
    assert all((gradient == 0).all() for gradient in found.values())


@pytest.mark.parametrize("kind", KINDS)
def test_it_does_not_change_the_gradient_of_other_batches(make_student, trainer_of, kind):
    dataset = rows("preferences") if kind == "prefer" else rows()
    mixed = dataset.map(lambda row, index: {"images": row["images"] if index % 2 else []}, with_indices=True)
    student = make_student()
    found = raw_gradients(trainer_of(kind, student, dataset=mixed, train_modules=["adaptor"]))
    assert any((gradient != 0).any() for gradient in found.values())
