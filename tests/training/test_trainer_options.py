"""Every option of the trainers' configs is read or refused; the tables are held against the installed libraries."""

import dataclasses
import re
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import transformers
import trl.trainer
import yaml
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import TrainingArguments, trainer_optimizer

import llava_mod_hf
from helpers.ddp_gradients import RUN, mimic_trainer, rows
from helpers.preference_trainers import preference_trainer
from llava_mod_hf import MimicConfig, MimicTrainer, PreferenceConfig, PreferenceTrainer, recipes
from llava_mod_hf.training import trainer_options
from llava_mod_hf.training.adapt_config import AdaptConfig
from llava_mod_hf.training.adapt_trainer import AdaptTrainer
from llava_mod_hf.training.run_folder import start_run
from llava_mod_hf.training.trainer_options import DEPENDENT, REFUSED, limit_max_length, verdicts

CONFIGS = {"adapt": AdaptConfig, "mimic": MimicConfig, "prefer": PreferenceConfig}
TRAINERS = {"adapt": AdaptTrainer, "mimic": MimicTrainer, "prefer": PreferenceTrainer}
STOCK = TrainingArguments("out", use_cpu=True)
SETTINGS = {"output_dir": "out", "use_cpu": True, "bf16": False}
# a value that is not the default
VALUES = {
    "torch_compile_backend": "inductor",
    "torch_compile_mode": "default",
    "liger_kernel_config": {"rope": True},
    "label_names": ["labels"],
    "length_column_name": "tokens",
    "packing_strategy": "wrapped",
    "dataset_kwargs": {"skip_prepare_dataset": True},
    "chat_template_path": "template.jinja",
    "average_tokens_across_devices": False,
    "precompute_ref_batch_size": 2,
    "pad_to_multiple_of": 64,
    "jsd_beta": 0.3,
    "on_policy_max_new_tokens": 8,
    "f_alpha_divergence_coef": 0.3,
    "discopop_tau": 0.1,
    "ref_model_mixup_alpha": 0.5,
    "ref_model_sync_steps": 8,
    "label_smoothing_factor": 0.1,
    "divergence": "reverse_kl",
    "temperature": 2.0,
    "teacher_weights": [0.5],
    "share_vision_tower": False,
    "max_tokens_per_batch": 512,
}

# what leaves an option unread, where the default of another is what makes it read
WITHOUT = {
    name: {"kl_weight": 0.0, "lm_weight": 1.0}
    for name in ("divergence", "temperature", "teacher_weights", "share_vision_tower", "shard_teacher")
}


def value_of(stage, name):
    return "dft" if name == "loss_type" else VALUES.get(name, True)


def refused():
    return [(stage, name) for stages, names, _ in REFUSED for stage in stages for name in names.split()]


def dependent():
    return [(stage, name) for stages, names, *_ in DEPENDENT for stage in stages for name in names.split()]


# Of the newest release that the package allows, and not of the lowest.
NEWER = {"activation_checkpointing", "activation_checkpointing_kwargs"}  # transformers 5.23


def options(stage):
    return {item.name for item in dataclasses.fields(CONFIGS[stage])}


@pytest.mark.parametrize("stage", CONFIGS)
def test_every_option_is_in_the_tables(stage):
    assert options(stage) <= set(verdicts(stage)) <= options(stage) | NEWER


@pytest.fixture(scope="module")
def sources():
    """What the parents' code reads, by a trainer: the text of what runs with these options."""
    package = Path(transformers.__file__).parent
    paths = [*package.glob("trainer*.py"), *package.glob("integrations/*.py"), package / "training_args.py"]
    shared = "".join(path.read_text() for path in [*paths, package / "optimization.py"])
    parent = {stage: (Path(trl.trainer.__file__).parent / f"{kind}_trainer.py").read_text() for stage, kind in
              (("adapt", "sft"), ("mimic", "sft"), ("prefer", "dpo"))}  # fmt: skip
    callbacks = (Path(trl.trainer.__file__).parent / "callbacks.py").read_text()
    ours = "".join(
        path.read_text() for path in Path(llava_mod_hf.__file__).parent.rglob("*.py") if path.stem != "trainer_options"
    )
    return {stage: {"parent": shared + text + callbacks, "us": ours} for stage, text in parent.items()}


@pytest.mark.parametrize("stage", CONFIGS)
def test_what_is_read_is_read_by_whom_the_tables_say(sources, stage):
    for name, verdict in verdicts(stage).items():
        if verdict.startswith("read by") and name in options(stage):
            assert re.search(rf"\.{name}\b", sources[stage][verdict.split()[-1]]), name


@pytest.mark.parametrize(("stage", "name"), [*refused(), *dependent()])
def test_what_would_do_nothing_is_refused_by_the_config_and_in_a_recipe(stage, name, tmp_path):
    value = value_of(stage, name)
    with pytest.raises(ValueError, match=f"`{name}` is {re.escape(repr(value))}, which"):
        CONFIGS[stage](**SETTINGS, **WITHOUT.get(name, {}), **{name: value})
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**SETTINGS, **WITHOUT.get(name, {}), name: value}))
    with pytest.raises(ValueError, match=f"`{name}` is .*, which"):
        recipes.parse([CONFIGS[stage]], ["--config", str(recipe)])


@pytest.mark.parametrize(("stage", "name"), [pair for pair in dependent() if pair[1] != "activation_offloading"])
def test_what_another_option_makes_read_is_taken_with_it(stage, name):
    other = {
        "jsd_beta": {"divergence": "jsd"},
        "on_policy_max_new_tokens": {"on_policy_share": 0.5},
        "f_alpha_divergence_coef": {"f_divergence_type": "alpha_divergence"},
        "discopop_tau": {"loss_type": ["sigmoid", "discopop"]},
        "ref_model_mixup_alpha": {"sync_ref_model": True, "reference": "self"},
        "ref_model_sync_steps": {"sync_ref_model": True, "reference": "self"},
        "max_tokens_per_batch": {"train_sampling_strategy": "group_by_length"},
    }.get(name, {})
    assert other or name in WITHOUT
    value = value_of(stage, name)
    assert getattr(CONFIGS[stage](**SETTINGS, **other, **{name: value}), name) == value


@pytest.mark.parametrize(
    ("stage", "args", "message"),
    [
        ("mimic", {"kl_weight": 0.0}, r"`kl_weight`, `lm_weight` is \[0.0, 0.0\].*not all of them 0"),
        ("mimic", {"kl_weight": -1.0, "lm_weight": 1.0}, r"`kl_weight`, `lm_weight` is \[-1.0, 1.0\]"),
        ("mimic", {"lm_weight": float("nan")}, "`kl_weight`, `lm_weight` is"),
        (
            "mimic",
            {"divergence": "jsd", "reference_compat": ["soft_cross_entropy"]},
            "`divergence` is 'jsd', which does nothing beside `reference_compat: .*leave one out",
        ),
        ("mimic", {"teacher_weights": [0.0, 0.0]}, r"`teacher_weights` is \[0.0, 0.0\]"),
        ("mimic", {"teacher_weights": [1.0, -0.5]}, r"`teacher_weights` is \[1.0, -0.5\]"),
        ("mimic", {"teacher_weights": []}, r"`teacher_weights` is \[\]"),
        ("mimic", {"teacher_weights": 1.0}, r"`teacher_weights` is 1.0: give a value of list\[float\]"),
        ("prefer", {"loss_weights": [0.0]}, r"`loss_weights` is \[0.0\]"),
        ("prefer", {"loss_weights": [-1.0]}, r"`loss_weights` is \[-1.0\]"),
        ("prefer", {"loss_weights": [1.0, 1.0]}, "`loss_weights` must have the same length"),
        ("prefer", {"loss_weights": []}, "`loss_weights` must have the same length"),
        ("prefer", {"loss_type": []}, r"`loss_type` is \[\]"),
        ("prefer", {"loss_type": None}, "`loss_type` is None"),
        ("prefer", {"beta": None}, "`beta` is None.*leave it out for 0.1"),
        ("mimic", {"kl_weight": None}, "`kl_weight` is None.*leave it out for 1.0"),
        ("mimic", {"rows_per_chunk": None}, "`rows_per_chunk` is None: give a value of int, or leave it out for 256"),
        ("mimic", {"rows_per_chunk": 2.5}, "`rows_per_chunk` is 2.5: give a value of int"),
        ("mimic", {"divergence": ["jsd"]}, r"`divergence` is \['jsd'\]: give a value of str"),
        ("mimic", {"reference_compat": 5}, r"`reference_compat` is 5: give a value of list\[str\] . None"),
        ("mimic", {"teacher_weights": [None]}, r"`teacher_weights` is \[None\]: give a value of list\[float\]"),
        ("prefer", {"loss_weights": 1.0}, "`loss_weights` is 1.0"),
        ("prefer", {"beta": [0.1]}, r"`beta` is \[0.1\]: give a value of float"),
        ("prefer", {"beta": float("inf")}, "`beta` is inf"),
        ("prefer", {"gradient_checkpointing_kwargs": {"selective": True}}, "`gradient_checkpointing_kwargs` has"),
        *(
            (stage, {"train_modules": modules}, re.escape(f"`train_modules` is {modules!r}"))
            for stage in CONFIGS
            for modules in ([], [None], "adaptor", 5)
        ),
    ],
)
def test_weights_and_empty_values_are_refused_by_the_config_and_in_a_recipe(stage, args, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        CONFIGS[stage](**SETTINGS, **args)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**SETTINGS, **args}))
    with pytest.raises(ValueError, match=rf"{message}|`{next(iter(args))}: .*is of another kind than"):
        recipes.parse([CONFIGS[stage]], ["--config", str(recipe)])


@pytest.mark.parametrize("stage", CONFIGS)
def test_a_backend_of_several_processes_is_refused_where_there_is_one(stage):
    with pytest.raises(
        ValueError, match="`ddp_backend` is 'gloo', and this is one process alone: start the stage with"
    ):
        CONFIGS[stage](**SETTINGS, ddp_backend="gloo")


# as `torchrun --nproc-per-node 1` and `mpirun` tell a process, and as who makes the group himself
@pytest.mark.parametrize("launcher", [{"LOCAL_RANK": "0", "WORLD_SIZE": "1"}, {"OMPI_COMM_WORLD_SIZE": "2"}, {}])
def test_a_backend_is_taken_where_a_launcher_started_the_process(launcher, monkeypatch):
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: not launcher)
    monkeypatch.setattr(TrainingArguments, "_setup_devices", torch.device("cpu"))  # no process group in this process
    assert MimicConfig(**SETTINGS, ddp_backend="gloo").ddp_backend == "gloo"


@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "lion_8bit"])
def test_an_optimiser_of_a_library_that_is_missing_is_refused_first(trainer_of, tmp_path, monkeypatch, optim):
    monkeypatch.setattr(trainer_optimizer, "is_bitsandbytes_available", lambda: False)
    told = f"`optim` is `.*{optim.split('_')[-1]}`, whose library is not installed .*bitsandbytes.*give `adamw_torch`"
    with pytest.raises(ValueError, match=told):
        trainer_of("mimic", args={"optim": optim})
    with pytest.raises(ValueError, match=told):
        start_run(MimicConfig(**{**SETTINGS, "output_dir": str(tmp_path)}, optim=optim))


@pytest.mark.parametrize("optim", ["paged_adamw_8bit", "paged_adamw_32bit", "adamw_8bit"])
def test_an_optimiser_of_few_bits_gets_what_is_trained_alone(trainer_of, monkeypatch, optim):
    """With a stand-in for its library, which needs a GPU: the parent hands it the bits and the pages."""

    class AdamW(torch.optim.AdamW):
        def __init__(self, params, optim_bits, is_paged, **kwargs):
            super().__init__(params, **kwargs)
            self.asked = (optim_bits, is_paged)

    lora = LoraConfig(r=2, target_modules=r".*language_model.*\.q_proj")
    with monkeypatch.context() as patch:
        patch.setattr(trainer_options, "check_libraries", lambda args: None)
        trainer = trainer_of("mimic", args={"optim": optim}, peft_config=lora)
    manager = SimpleNamespace(register_module_override=lambda *args: None)
    library, optimisers = ModuleType("bitsandbytes"), ModuleType("bitsandbytes.optim")
    optimisers.AdamW = optimisers.Lion = optimisers.RMSprop = AdamW
    optimisers.GlobalOptimManager = SimpleNamespace(get_instance=lambda: manager)
    library.optim = optimisers
    library.__spec__ = optimisers.__spec__ = ModuleSpec("bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", library)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", optimisers)
    monkeypatch.setattr(trainer_optimizer, "is_bitsandbytes_available", lambda: True)
    optimiser = trainer.create_optimizer()
    assert optimiser.asked == (8 if "8bit" in optim else 32, "paged" in optim)
    given = {id(parameter) for group in optimiser.param_groups for parameter in group["params"]}
    assert given == {id(p) for name, p in trainer.model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "wandb",
            "`report_to` is 'wandb', and its library is not installed: `pip install wandb`, or give one of trackio",
        ),
        ("tensorboard", "`report_to` is 'tensorboard', and its library is not installed: `pip install tensorboardX`"),
        ("tensorbord", "`report_to` is 'tensorbord', which transformers does not know: give one of trackio"),
    ],
)
def test_a_tracker_that_is_not_there_is_refused(make_student, processor, tmp_path, monkeypatch, name, message):
    monkeypatch.setattr(trainer_options, "get_available_reporting_integrations", lambda: ["trackio"])
    for report_to in (name, ["trackio", name]):
        with pytest.raises(ValueError, match=message):
            start_run(MimicConfig(**{**RUN, "report_to": report_to}, output_dir=str(tmp_path)))
        with pytest.raises(ValueError, match=message):
            mimic_trainer(make_student(moe_layers=[]), None, processor, tmp_path, report_to=report_to)


# What a trainer is given beside them


@pytest.fixture
def trainer_of(make_student, processor, tmp_path):
    """`trainer_of(kind, student, **arguments)`: a trainer with arguments of its own, and options as `args`."""

    def make(kind, student=None, args=None, **kwargs):
        student = make_student() if student is None else student
        config = CONFIGS[kind](**{**RUN, "per_device_train_batch_size": 4, "output_dir": str(tmp_path), **(args or {})})
        teacher = [] if kind == "adapt" else [make_student(moe_layers=[], seed=1)]
        dataset = rows("preferences") if kind == "prefer" else rows()
        return TRAINERS[kind](
            student,
            *teacher,
            args=kwargs.pop("config", config),
            train_dataset=dataset,
            processing_class=processor,
            **kwargs,
        )

    return make


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_learnt_prompt_is_refused(make_student, trainer_of, kind):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="PromptTuningConfig learns a prompt"):
        trainer_of(kind, peft_config=config)
    with pytest.raises(ValueError, match="PromptTuningConfig learns a prompt"):
        trainer_of(kind, get_peft_model(make_student(), config))


@pytest.mark.parametrize(
    ("kind", "args", "kwargs", "message"),
    [
        ("mimic", {}, {"compute_loss_func": len}, "`compute_loss_func` would not be called"),
        ("prefer", {}, {"compute_loss_func": len}, "`compute_loss_func` would not be called"),
        ("mimic", {}, {"formatting_func": len}, "`formatting_func` would not be called"),
        ("adapt", {}, {"formatting_func": len}, "`formatting_func` would not be called"),
        *((kind, {"model_init_kwargs": {"a": 1}}, {}, "`model_init_kwargs` is for a model given by its name")
          for kind in CONFIGS),
        ("mimic", {}, {"quantization_config": 8}, "`quantization_config` is for a model given by its name"),
        ("adapt", {"dataset_text_field": "words"}, {}, "`dataset_text_field` is `words`, and the rows have"),
        *((kind, {}, {"config": STOCK}, "`args` is a TrainingArguments: give a") for kind in CONFIGS),
    ],
)  # fmt: skip
def test_what_a_trainer_would_not_use_is_refused(trainer_of, kind, args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(kind, args=args, **kwargs)


@pytest.mark.parametrize("kind", ["mimic", "prefer"])
@pytest.mark.parametrize("adapted", [False, True], ids=["student", "adapted student"])
def test_a_student_is_not_its_own_teacher(make_student, processor, tmp_path, kind, adapted):
    teacher = make_student(moe_layers=[])
    student = get_peft_model(teacher, LoraConfig(target_modules=["q_proj"])) if adapted else teacher
    make = mimic_trainer if kind == "mimic" else preference_trainer
    trainable = [parameter.requires_grad for parameter in student.parameters()]
    with pytest.raises(ValueError, match="teacher is the student itself"):
        make(student, teacher, processor, tmp_path)
    assert [parameter.requires_grad for parameter in student.parameters()] == trainable


@pytest.mark.parametrize("trainer", [AdaptTrainer, MimicTrainer, PreferenceTrainer])
def test_rows_longer_than_the_students_positions_are_refused(make_student, processor, tmp_path, trainer):
    student = make_student()
    student.config.text_config.max_position_embeddings = 512
    config_class = {AdaptTrainer: AdaptConfig, MimicTrainer: MimicConfig, PreferenceTrainer: PreferenceConfig}[trainer]
    models = [student] if trainer is AdaptTrainer else [student, make_student(seed=1)]
    args = config_class(output_dir=str(tmp_path), max_length=700, use_cpu=True, bf16=False, report_to="none")
    with pytest.raises(ValueError, match="`max_length` is 700, and the student has 512 positions"):
        trainer(*models, args, train_dataset=None, processing_class=processor)


@pytest.mark.parametrize("max_length", [None, 1024])  # nobody chose it
def test_what_nobody_chose_is_limited_to_the_students_positions(make_student, tmp_path, caplog, max_length):
    student = make_student()
    student.config.text_config.max_position_embeddings = 512
    args = MimicConfig(output_dir=str(tmp_path), max_length=max_length, use_cpu=True, bf16=False)
    limit_max_length(args, student)
    assert args.max_length == 512
    assert "`max_length` is 512, as many as the student has positions" in caplog.text
    args.max_length = 300
    limit_max_length(args, student)
    assert args.max_length == 300
