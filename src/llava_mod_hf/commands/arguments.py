"""Groups of options that several commands share."""

from dataclasses import dataclass, field

from llava_mod_hf.data.fitting import fit_rows
from llava_mod_hf.loading import load_model_and_processor
from llava_mod_hf.students.upcycling import PLACEMENTS, upcycle
from llava_mod_hf.teachers.answer_cache import teacher_settings


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

    def teacher_settings(self, trust_remote_code):
        """What a cache of the teacher has to be made with, for these arguments."""
        return teacher_settings(
            self.teacher,
            dtype=self.teacher_dtype,
            quantization=self.teacher_quantization,
            trust_remote_code=trust_remote_code,
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


def fit_to_recipe(rows, processor, data_args, args):
    """
    [`~llava_mod_hf.data.fitting.fit_rows`] with the options of a recipe.

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
