"""Adapters by the words of a recipe: what is trained, and with which gradients; what stays as it was."""

import dataclasses

import pytest
import torch
from peft import LoraConfig, get_peft_model
from trl import ModelConfig

from helpers.ddp_gradients import RUN, assert_gradients_close, mimic_trainer, raw_gradients, rows
from helpers.models import FAMILIES, make_dense
from helpers.preference_trainers import log_probabilities, preference_trainer
from helpers.trainers import ONE_FAST
from llava_mod_hf import MimicConfig, PreferenceConfig, upcycle
from llava_mod_hf.training.adapt_config import AdaptConfig
from llava_mod_hf.training.adapt_trainer import AdaptTrainer
from llava_mod_hf.training.lora import lora_config
from llava_mod_hf.training.lora_options import LoraOptions

CONFIGS = {"adapt": AdaptConfig, "mimic": MimicConfig, "prefer": PreferenceConfig}
SETTINGS = {"output_dir": "unused", "use_cpu": True, "bf16": False, "report_to": "none"}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@pytest.fixture
def trainer_of(models, processor, tmp_path):
    """`trainer_of(kind, moe_layers=(0, 2), dtype=None, **options)`: a trainer of an adapted student, its teacher."""

    def make(kind, moe_layers=(0, 2), dtype=None, **args):
        student, teacher = (model.to(dtype or torch.float32) for model in models(moe_layers))
        student.name_or_path = "somewhere"
        if dtype is torch.float64:
            student.set_experts_implementation("eager")  # the other has no float64
        args = {"use_peft": True, "train_modules": None, "lora_r": 4, **args}
        if kind == "adapt":
            own = {name: args.pop(name) for name in ("peft_config", "batch", "accumulation") if name in args}
            sizes = {
                "per_device_train_batch_size": own.pop("batch", 4),
                "gradient_accumulation_steps": own.pop("accumulation", 1),
            }
            config = AdaptConfig(output_dir=str(tmp_path), router_aux_loss_coef=0.0, **{**RUN, **sizes, **args})
            return AdaptTrainer(student, config, train_dataset=rows(), processing_class=processor, **own), None
        make = mimic_trainer if kind == "mimic" else preference_trainer
        return make(student, teacher, processor, tmp_path, **args), teacher

    return make


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def adapted(model):
    """The weights that have an adapter, by their names in the student; of nested wrappers the inner ones first."""
    found = set()
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            own = name.replace("base_model.model.", "").replace(".base_layer", "")
            found.add(f"{own}.{module.parameter_name}" if hasattr(module, "parameter_name") else f"{own}.weight")
    return found


def weights_of(student, words):
    """Names of a student's weights that each word stands for."""
    names = {
        "attention": lambda name: ".self_attn." in name,
        "ffn": lambda name: name.endswith(tuple(f"mlp.{part}_proj.weight" for part in ("gate", "up", "down"))),
        "experts": lambda name: ".experts." in name,
        "router": lambda name: ".mlp.gate." in name,
    }
    known = [name for name, _ in student.named_parameters() if "language_model" in name]
    return {name for name in known for word in words if names[word](name)}


# What is trained


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(
    ("target", "words"),
    [
        (["attention"], ["attention"]),
        (["experts"], ["experts"]),
        ("router", ["router"]),
        (["ffn", "attention"], ["attention", "ffn"]),
        (None, ["attention", "ffn", "experts", "router"]),
        (["all"], ["attention", "ffn", "experts", "router"]),
    ],
)
def test_a_word_names_its_weights_of_the_language_model_and_the_adaptor_stays_whole(
    trainer_of, make_student, kind, target, words
):
    trainer, _ = trainer_of(kind, lora_target=target)
    expected = weights_of(make_student(), words)
    assert len(expected) >= 2
    assert adapted(trainer.model) == expected
    names = trained(trainer.model)
    assert all("lora_" in name or "multi_modal_projector.modules_to_save" in name for name in names)
    assert len([name for name in names if "multi_modal_projector" in name]) == 4
    assert len([name for name in names if "lora_A" in name]) == len(expected)


def test_all_of_a_dense_student_is_attention_and_ffn(trainer_of, make_student):
    trainer, _ = trainer_of("mimic", moe_layers=(), lora_dropout=0.1)
    assert adapted(trainer.model) == weights_of(make_student(moe_layers=[]), ["attention", "ffn"])


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_and_ffns_are_found_in_every_family(family):
    student = make_dense(family)
    student.name_or_path = "somewhere"
    options = LoraOptions(use_peft=True)
    options.train_modules = None
    model = get_peft_model(student, lora_config(options, student))
    known = [name for name, _ in make_dense(family).named_parameters() if "language_model" in name]
    expected = {
        name
        for name in known
        if (".self_attn." in name or ".mlp." in name) and name.endswith(".weight") and "norm" not in name
    }
    assert adapted(model) == expected


@pytest.mark.parametrize("experts", [{"expert_rank": 4}, {"use_residual": True}], ids=["low rank", "residual"])
def test_other_experts_are_found_too_with_the_ffn_that_they_share(experts):
    student = upcycle(make_dense("phi"), **experts)  # whose matrices have biases
    student.name_or_path = "somewhere"
    options = LoraOptions(use_peft=True)
    options.train_modules = None
    expected = {
        name
        for name, value in student.named_parameters()
        if "language_model.layers." in name and value.dim() > 1 and not name.endswith("_bias")
    }
    assert any(".shared." in name or ".residual_mlp." in name for name in expected)
    assert adapted(get_peft_model(student, lora_config(options, student))) == expected


def test_ranks_and_scales_arrive(trainer_of):
    trainer, _ = trainer_of("mimic", lora_r=3, lora_alpha=12, use_rslora=True, lora_target=["attention"])
    config = trainer.model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.use_rslora, config.use_dora) == (3, 12, True, False)
    trainer, _ = trainer_of("mimic", use_dora=True, lora_dropout=0.25, lora_target="attention")
    config = trainer.model.peft_config["default"]
    assert (config.lora_dropout, config.use_dora) == (0.25, True)


def test_pefts_own_words_are_taken_too(trainer_of):
    trainer, _ = trainer_of(
        "mimic",
        lora_target_modules=[r".*language_model.*\.q_proj"],
        lora_target_parameters=["mlp.experts.down_proj"],
        lora_modules_to_save=["input_layernorm"],
    )
    assert {name.split("layers.0.")[-1] for name in adapted(trainer.model) if "layers.0" in name} == {
        "self_attn.q_proj.weight",
        "mlp.experts.down_proj",
    }
    whole = {name for name in trained(trainer.model) if "lora_" not in name}
    assert {name.split(".modules_to_save")[0].split(".")[-1] for name in whole} == {"input_layernorm"}


def test_train_modules_may_leave_the_adaptor_out(trainer_of):
    trainer, _ = trainer_of("mimic", train_modules=["language_model"])
    assert not [name for name in trained(trainer.model) if "multi_modal_projector" in name]
    assert trainer.model.peft_config["default"].modules_to_save is None


def test_the_options_are_those_of_trl():
    theirs = {item.name: item.default for item in dataclasses.fields(ModelConfig)}
    own = {item.name: item.default for item in dataclasses.fields(LoraOptions) if item.name != "lora_target"}
    assert own.pop("lora_dropout") == 0.0  # which experts need; theirs is 0.05
    assert own.items() <= theirs.items()


# How it is trained


@pytest.mark.parametrize("kind", ONE_FAST)
def test_gradients_of_an_adapter_do_not_depend_on_the_split_nor_on_checkpointing(trainer_of, kind):
    def gradients(**args):
        plain, _ = trainer_of(kind)
        adapter = plain.model.peft_config["default"]
        adapter.init_lora_weights = False  # else B is 0, and A has no gradient
        torch.manual_seed(0)
        trainer, _ = trainer_of(kind, use_peft=False, lora_r=16, peft_config=adapter, **args)
        return trainer.model, raw_gradients(trainer)

    model, expected = gradients()
    assert expected.keys() == trained(model)
    moved = [name for name, gradient in expected.items() if gradient.any()]
    for part in ("q_proj.lora_A", "gate_proj.lora_B", "experts.lora_A", "mlp.gate.lora_B", "multi_modal_projector"):
        assert any(part in name for name in moved), part
    for args in (
        {"batch": 2, "accumulation": 2},
        {"batch": 1, "accumulation": 4},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    ):
        _, found = gradients(**args)
        assert_gradients_close(found, expected)


def test_gradients_are_those_of_the_weights_themselves_through_the_low_rank_product(trainer_of, processor, tmp_path):
    def drawn():
        adapter = trainer_of("mimic", dtype=torch.float64)[0].model.peft_config["default"]
        adapter.init_lora_weights = False
        torch.manual_seed(0)
        return trainer_of("mimic", dtype=torch.float64, use_peft=False, lora_r=16, peft_config=adapter)

    trainer, teacher = drawn()
    found = raw_gradients(trainer)
    merged = drawn()[0].model.merge_and_unload()
    merged.requires_grad_(True)
    of_weights = raw_gradients(mimic_trainer(merged, teacher, processor, tmp_path))
    model, expected = drawn()[0].model, {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            weight = name.replace("base_model.model.", "").replace(".base_layer", "")
            pair = [module.lora_A["default"].weight, module.lora_B["default"].weight]
            gradient = of_weights[f"{weight}.{getattr(module, 'parameter_name', 'weight')}"]
            gradients = torch.autograd.grad(module.get_delta_weight("default"), pair, gradient)
            expected |= zip((f"{name}.lora_{side}.default.weight" for side in "AB"), gradients, strict=True)
    assert_gradients_close({name: value for name, value in found.items() if "lora_" in name}, expected)
    whole = {name.split(".modules_to_save.default.")[-1]: value for name, value in found.items() if "lora_" not in name}
    adaptor = "model.multi_modal_projector."
    assert_gradients_close(
        whole, {name.removeprefix(adaptor): value for name, value in of_weights.items() if name.startswith(adaptor)}
    )


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_is_adapted_stays_as_it_was_and_so_does_the_teacher(trainer_of, models, kind):
    trainer, teacher = trainer_of(kind, max_steps=2, learning_rate=0.1)
    trainer.train()
    student, untouched = models()
    model = trainer.model
    changed = {
        name
        for name, value in model.unload().state_dict().items()
        if not torch.equal(value, student.state_dict()[name])
    }
    assert changed == {name for name in student.state_dict() if "multi_modal_projector" in name}
    if teacher is not None:
        assert all(torch.equal(value, untouched.state_dict()[name]) for name, value in teacher.state_dict().items())
        assert not [name for name, _ in teacher.named_modules() if "lora" in name]


def test_the_reference_of_an_adapted_student_is_the_teacher(trainer_of):
    trainer, teacher = trainer_of("prefer", learning_rate=0.5, max_steps=2)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    with torch.no_grad():
        chosen, rejected = log_probabilities(teacher, batch)[0].chunk(2)
    expected = (chosen - rejected).mean().item()
    trainer.train()
    logged = [logs["margins/teacher"] for logs in trainer.state.log_history if "margins/teacher" in logs]
    assert logged == pytest.approx([expected, expected], rel=1e-4)
    students = [logs["margins/student"] for logs in trainer.state.log_history if "margins/student" in logs]
    assert abs(students[1] - students[0]) > 1e-3


# What is refused


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"lora_r": 8}, "`lora_r` is 8, which does nothing without `use_peft`"),
        ({"lora_target": ["all"]}, r"`lora_target` is \['all'\], which does nothing without `use_peft`"),
        ({"use_peft": True, "lora_target": ["experts", "heads"]}, "give some of attention, ffn, experts, router, or"),
        ({"use_peft": True, "lora_target": []}, r"`lora_target` is \[\]: give some of"),
        ({"use_peft": True, "lora_r": 0}, "`lora_r` is 0.*give a rank"),
        ({"use_peft": True, "lora_dropout": 1.5}, "`lora_dropout` 1.5"),
        ({"use_peft": True, "lora_target": "router", "lora_dropout": 0.1}, "`lora_dropout` is 0.1, .* such as router"),
        ({"use_peft": True, "lora_target": ["experts"], "use_dora": True}, "`use_dora` is True, .* such as experts"),
        ({"use_peft": True, "lora_target": "all", "lora_target_modules": ["q_proj"]}, "give one of the two"),
        (
            {"use_peft": True, "lora_target": ["experts"], "train_modules": ["adaptor"]},
            r"`lora_target` names `experts`, and `train_modules` is \['adaptor'\]: add language_model or ffn there",
        ),
    ],
)
def test_options_that_do_nothing_or_contradict_are_refused(kind, args, message):
    with pytest.raises(ValueError, match=message):
        CONFIGS[kind](**SETTINGS, **args)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"moe_layers": (), "lora_target": ["experts"]}, "`lora_target` names `experts`, and this LlavaMod.* has none"),
        ({"lora_dropout": 0.1}, r"`lora_dropout` is 0.1, which peft does not have for parameters such as mlp.experts"),
        ({"peft_config": LoraConfig()}, "`use_peft` is true, and there is a `peft_config` as well"),
    ],
)
def test_what_a_student_does_not_have_is_refused(trainer_of, args, message):
    with pytest.raises(ValueError, match=message):
        trainer_of("mimic", **args)


def test_an_adapter_of_a_student_that_is_in_memory_alone_is_refused(models, processor, tmp_path):
    student, teacher = models()
    with pytest.raises(ValueError, match="made in memory.*save it, by `llava-mod upcycle`"):
        mimic_trainer(student, teacher, processor, tmp_path, use_peft=True, train_modules=None)
    dense, _ = models(())
    dense.name_or_path = "somewhere"
    with pytest.raises(ValueError, match="made in memory"):
        mimic_trainer(upcycle(dense), teacher, processor, tmp_path, use_peft=True, train_modules=None)


def test_an_adapter_beside_an_adapter_is_refused(models, processor, tmp_path):
    student, teacher = models()
    student = get_peft_model(student, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="the student has an adapter already"):
        mimic_trainer(student, teacher, processor, tmp_path, use_peft=True, train_modules=None)
