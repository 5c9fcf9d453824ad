"""One function per stage: build the student, train it, save it."""

import dataclasses
import json
import os
import re
import shutil
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from transformers import ProgressCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from llava_mod_hf.data import DataArguments, load_rows  # noqa: F401 (the command line looks up its groups here)
from llava_mod_hf.fitting import fit_rows
from llava_mod_hf.grouping import GroupedBatches
from llava_mod_hf.mimic import MimicConfig, MimicTrainer  # noqa: F401
from llava_mod_hf.preference import PreferenceConfig, PreferenceTrainer  # noqa: F401
from llava_mod_hf.reference import CachedReference
from llava_mod_hf.students import build_student
from llava_mod_hf.teacher import load_model_and_processor
from llava_mod_hf.teacher_cache import CachedTeacher, cache_settings
from llava_mod_hf.trainable import check_train_modules, set_trainable, train_only  # noqa: F401 (found here before)
from llava_mod_hf.trainer_options import check_dependent_options, check_options, check_trainer
from llava_mod_hf.upcycling import PLACEMENTS, upcycle

RUN_FILE = "run.json"


@dataclass
class StudentArguments:
    """
    What a new student is made of.

    Args:
        vision_tower (`str`): CLIP- or SigLIP-like model, or a LLaVA whose encoder is taken.
        language_model (`str`): causal language model.
        student_dtype (`str`, *optional*, defaults to `"float32"`): of its weights in memory, and in the checkpoint.
    """

    vision_tower: str = field(metadata={"help": "vision encoder, or a LLaVA whose encoder is taken"})
    language_model: str = field(metadata={"help": "causal language model"})
    student_dtype: str = "float32"


@dataclass
class AdaptConfig(SFTConfig):
    """
    [`~trl.SFTConfig`] of the adaptor stage.

    Args:
        train_modules (`list[str]`, *optional*):
            Parts that are trained, as in [`~llava_mod_hf.MimicConfig`]; by default the paper's, the adaptor alone.
    """

    train_modules: list[str] | None = field(default=None)

    def __post_init__(self):
        check_options(self, "adapt")
        super().__post_init__()
        check_dependent_options(self, "adapt")
        check_train_modules(self.train_modules)


@dataclass
class DistillArguments:
    """
    Who learns from whom.

    Args:
        student (`str`): checkpoint of the previous stage, or a LLaVA of the Hub.
        teacher (`str`): a vision-language model of the same tokenizer; images and chat template may be its own.
        teacher_dtype (`str`, *optional*, defaults to `"float32"`): of its weights in memory.
        teacher_quantization (`str`, *optional*):
            `"8bit"`, `"4bit"`, or the JSON of a quantisation of transformers, with its `quant_method`.
        teacher_device (`str`, *optional*): where its weights go, such as `cuda:1` or `auto`; by default to the student.
        teacher_cache (`str`, *optional*):
            Folder or Hub data set of `llava-mod cache-teacher` or, for pairs, `cache-reference`: trained from, with no
            teacher in memory. `teacher` is then compared with what the cache was made with, as far as it is on this
            machine.
        attn_implementation (`str`, *optional*): of both, as in transformers, such as `sdpa` or `eager`.
    """

    student: str = field(metadata={"help": "checkpoint of the previous stage"})
    teacher: str = field(metadata={"help": "a vision-language model of the same tokenizer"})
    teacher_dtype: str = "float32"
    teacher_quantization: str | None = None
    teacher_device: str | None = None
    teacher_cache: str | None = None
    attn_implementation: str | None = None

    def load_student(self, trust_remote_code):
        return load_model_and_processor(
            self.student, attn_implementation=self.attn_implementation, trust_remote_code=trust_remote_code
        )

    def load_teacher(self, trust_remote_code):
        return load_model_and_processor(
            self.teacher,
            dtype=self.teacher_dtype,
            quantization=self.teacher_quantization,
            device=self.teacher_device,
            attn_implementation=self.attn_implementation,
            trust_remote_code=trust_remote_code,
        )


def settings_of_cache(distill_args, args, processor, columns):
    """What a cache of the teacher's answers has to be made with, for these arguments and the columns of the rows."""
    completion_only = args.completion_only_loss
    if completion_only is None:  # as the parent of the trainer decides
        completion_only = {"prompt", "completion"} <= set(columns)
    loss_on = "assistant" if args.assistant_only_loss else "completion" if completion_only else "all"
    return {"temperature": args.temperature, **_settings(distill_args, args, processor, loss_on)}


def settings_of_reference(distill_args, args, processor):
    """What a cache of the teacher's log-probabilities of pairs has to be made with, for these arguments."""
    return _settings(distill_args, args, processor, "pairs")


def _settings(distill_args, args, processor, loss_on):
    return cache_settings(
        distill_args.teacher,
        processor,
        loss_on=loss_on,
        dtype=distill_args.teacher_dtype,
        quantization=distill_args.teacher_quantization,
        autocast="bf16" if args.bf16 else "fp16" if args.fp16 else None,
        trust_remote_code=args.trust_remote_code,
    )


@dataclass
class UpcycleArguments:
    """
    Experts that a dense student gets.

    Args:
        moe_layers (`list[str]`, *optional*):
            `alternate`, `all`, `first_half`, `second_half`, or layer indices; without it the student stays as it is.
        num_experts (`int`, *optional*, defaults to 4).
        num_experts_per_tok (`int`, *optional*, defaults to 2).
    """

    moe_layers: list[str] | None = None
    num_experts: int = 4
    num_experts_per_tok: int = 2


def chosen_layers(moe_layers):
    """`moe_layers` of a recipe as `upcycle` takes it: a placement's name, or indices."""
    # a recipe may give one value without brackets
    layers = moe_layers if isinstance(moe_layers, list) else [moe_layers]
    layers = [int(layer) if str(layer).lstrip("-").isdigit() else layer for layer in layers]
    names = [layer for layer in layers if isinstance(layer, str)]
    if names and len(layers) > 1:
        raise ValueError(f"`moe_layers` is {layers}: give one of {', '.join(PLACEMENTS)}, or indices alone.")
    return names[0] if names else layers


def upcycle_student(student, args, *, router_aux_loss_coef=None, seed=0):
    """`upcycle` with the options of a recipe; the student itself if the recipe asks for no experts."""
    if args.moe_layers is None:
        return student
    layers = chosen_layers(args.moe_layers)
    coef = {} if router_aux_loss_coef is None else {"router_aux_loss_coef": router_aux_loss_coef}
    return upcycle(
        student,
        layers=layers,
        num_experts=args.num_experts,
        num_experts_per_tok=args.num_experts_per_tok,
        seed=seed,
        **coef,
    )


class AdaptTrainer(GroupedBatches, SFTTrainer):
    """
    [`~trl.SFTTrainer`] that trains the adaptor alone, or what [`AdaptConfig`] names, and whose
    `train_sampling_strategy: group_by_length` knows rows with images.
    """

    def __init__(self, model, args=None, **kwargs):
        args = args or AdaptConfig()
        check_trainer(args, AdaptConfig, model, **kwargs)
        super().__init__(model, args, **kwargs)
        train_only(self.model, args.train_modules, default=["adaptor"])


def fit_to_recipe(rows, processor, data_args, args):
    """
    [`~llava_mod_hf.fitting.fit_rows`] with the options of a recipe.

    Raises:
        ValueError: if rows are streamed without `max_steps`.
    """
    if data_args.streaming and args.max_steps <= 0:
        raise ValueError("`streaming` is true, so nobody knows how many rows come: give `max_steps`.")
    rows, _ = fit_rows(
        rows,
        processor,
        max_length=args.max_length,
        assistant_only_loss=getattr(args, "assistant_only_loss", False),  # of pairs there is no such option
        bad_rows=data_args.bad_rows,
        num_proc=args.dataset_num_proc,
    )
    return rows


def adapt(data_args, student_args, args):
    """Adaptor initialisation: next-token cross-entropy, only the adaptor is trained (paper, stage 1)."""
    recipe = start_run(data_args, student_args, args)
    rows = load_rows(data_args, columns=("prompt", "completion"), seed=args.seed, num_proc=args.dataset_num_proc)
    template = Path(args.chat_template_path).read_text() if args.chat_template_path else None
    args.chat_template_path = None  # read here: the parent would expect a tokenizer that has it already
    model, processor = build_student(
        student_args.vision_tower,
        student_args.language_model,
        chat_template=template,
        dtype=student_args.student_dtype,
        trust_remote_code=args.trust_remote_code,
        seed=args.seed,
    )
    rows = fit_to_recipe(rows, processor, data_args, args)
    trainer = AdaptTrainer(model, args, train_dataset=rows, processing_class=processor)
    return train_and_save(trainer, "adapt", recipe)


def mimic(data_args, distill_args, upcycle_args, args):
    """Mimic distillation, dense-to-dense or, with `moe_layers`, dense-to-sparse (paper, stage 2)."""
    recipe = start_run(data_args, distill_args, upcycle_args, args)
    rows = load_rows(data_args, columns=("prompt", "completion"), seed=args.seed, num_proc=args.dataset_num_proc)
    student, processor = distill_args.load_student(args.trust_remote_code)
    rows = fit_to_recipe(rows, processor, data_args, args)
    student = upcycle_student(student, upcycle_args, router_aux_loss_coef=args.router_aux_loss_coef, seed=args.seed)
    teacher, teacher_processor = None, None
    if args.kl_weight and distill_args.teacher_cache:
        expected = settings_of_cache(distill_args, args, processor, rows.column_names)
        teacher = CachedTeacher(distill_args.teacher_cache, expected=expected)
        teacher.check_rows(rows)
    elif args.kl_weight:
        teacher, teacher_processor = distill_args.load_teacher(args.trust_remote_code)
    trainer = MimicTrainer(
        student,
        teacher,
        args,
        train_dataset=rows,
        processing_class=processor,
        teacher_processor=teacher_processor,
    )
    stage = "mimic_sparse" if student.config.moe_layers else "mimic_dense"
    return train_and_save(trainer, stage, recipe)


def prefer(data_args, distill_args, args):
    """Preference distillation with the teacher as reference, or the student as it was (paper, stage 3)."""
    recipe = start_run(data_args, distill_args, args)
    columns = ("prompt", "chosen", "rejected")
    rows = load_rows(data_args, columns=columns, seed=args.seed, num_proc=args.dataset_num_proc)
    student, processor = distill_args.load_student(args.trust_remote_code)
    rows = fit_to_recipe(rows, processor, data_args, args)
    teacher, teacher_processor = None, None
    if args.reference == "teacher" and distill_args.teacher_cache:
        expected = settings_of_reference(distill_args, args, processor)
        teacher = CachedReference(distill_args.teacher_cache, expected=expected)
        teacher.check_rows(rows)
    elif args.reference == "teacher":
        teacher, teacher_processor = distill_args.load_teacher(args.trust_remote_code)
    trainer = PreferenceTrainer(
        student,
        teacher,
        args,
        train_dataset=rows,
        processing_class=processor,
        teacher_processor=teacher_processor,
    )
    return train_and_save(trainer, "prefer", recipe)


@dataclass
class Recipe:
    """Every option of a run, resolved, and those that somebody chose; plain YAML values, without the Hub token."""

    resolved: dict
    changed: dict


def start_run(*groups):
    """
    Refuses a folder that holds a finished run, and notes the options before a trainer changes any.

    Args:
        groups: the argument dataclasses of a stage, the trainer's last.

    Returns:
        [`Recipe`].

    Raises:
        ValueError: if `output_dir` holds a finished run.
    """
    check_output_dir(groups[-1].output_dir)
    resolved, changed = {}, {}
    for group in groups:
        required = {item.name for item in dataclasses.fields(group) if _has_no_default(item)}
        # without these three a TrainingArguments cannot be made everywhere
        required |= {"output_dir", "use_cpu", "bf16"} & {item.name for item in dataclasses.fields(group)}
        default = type(group)(**{name: getattr(group, name) for name in required})
        for item in dataclasses.fields(group):
            if item.init and item.name != "hub_token":
                value = getattr(group, item.name)
                resolved[item.name] = value
                if item.name in required or value != getattr(default, item.name):
                    changed[item.name] = value
    return Recipe(**json.loads(json.dumps({"resolved": resolved, "changed": changed}, default=_plain)))


def _plain(value):
    """`accelerator_config` is a dataclass once it is parsed; as a string the recipe could not be read again."""
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else str(value)


def _has_no_default(item):
    return item.init and item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING


class LossOnBar(ProgressCallback):
    """The parent prints every log line above the bar; the last loss beside it is enough, and `run.json` has all."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and "loss" in (logs or {}):
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.3f}")


class StepTimer(TrainerCallback):
    """Time of a step, without that of the first: it starts the loader's processes and warms everything up."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.ends = []

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append(time.perf_counter())

    def seconds_per_step(self):
        """`float`, or `None` after fewer than two steps."""
        return (self.ends[-1] - self.ends[0]) / (len(self.ends) - 1) if len(self.ends) > 1 else None


def check_output_dir(folder):
    """
    Raises:
        ValueError: if the folder holds a finished run, which training again would overwrite.
    """
    if (Path(folder) / RUN_FILE).is_file():
        raise ValueError(f"`{folder}` holds a finished run: give another `output_dir`, or remove it.")


def last_complete_checkpoint(folder):
    """
    The checkpoint with the highest step that was written to the end, or `None`.

    The trainer writes `trainer_state.json` last; its own look-up takes a half-written folder too.
    """
    found = {
        int(match[1]): path
        for path in Path(folder).glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and (path / "trainer_state.json").is_file()
    }
    return str(found[max(found)]) if found else None


def train_and_save(trainer, stage, recipe):
    """
    Trains, from the last complete checkpoint of the output folder if there is one, and saves what can be loaded.

    The output folder gets the weights, their code, the processor, `recipe.yaml` (every option, resolved) and, last,
    `run.json`.

    Returns:
        `dict`: what `run.json` holds: `stage`, `steps`, `seconds` (all of this start), `seconds_per_step` (without the
        first step), `first_loss`, `last_loss`, `log_history`, and `recipe` (the options that somebody chose).
    """
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(LossOnBar)
    timer = StepTimer()
    trainer.add_callback(timer)
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(trainer.args.output_dir))
    history = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    run = {
        "stage": stage,
        "steps": trainer.state.global_step,
        "seconds": time.perf_counter() - start,
        "seconds_per_step": timer.seconds_per_step(),
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "log_history": history,
        "recipe": recipe.changed,
    }
    output_dir = Path(trainer.args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir) as folder:
        trainer.save_model(folder)
        if trainer.is_world_process_zero():
            _move_checkpoint(Path(folder), output_dir)
            (output_dir / "recipe.yaml").write_text(yaml.safe_dump(recipe.resolved))
            write_json(output_dir / RUN_FILE, run)
    return run


def save_checkpoint(model, processor, folder):
    """Writes weights, their code and the processor; the folder cannot be loaded before it is whole."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)
        _move_checkpoint(Path(temporary), folder)


def _move_checkpoint(source, target):
    (source / "training_args.bin").unlink(missing_ok=True)  # a pickle, and `recipe.yaml` says the same
    # nothing loads a folder without `config.json`: it comes last
    for path in sorted(source.iterdir(), key=lambda path: path.name == "config.json"):
        if path.is_dir():
            shutil.rmtree(target / path.name, ignore_errors=True)
        os.replace(path, target / path.name)


def write_json(path, value):
    """Writes a JSON file at once: it is whole or not there."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(value, indent=1, default=str) + "\n")
    os.replace(temporary, path)
