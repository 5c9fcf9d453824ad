"""Groups of options that several commands share: they hold options and do nothing, so that `--help` imports little."""

from dataclasses import dataclass, field


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


@dataclass
class UpcycleArguments:
    """
    Experts that a dense student gets.

    Args:
        moe_layers (`list[str]`, *optional*):
            `alternate`, `all`, `first_half`, `second_half`, or layer indices; without it the student stays as it is.
        num_experts (`int`, *optional*, defaults to 4).
        num_experts_per_tok (`int`, *optional*, defaults to 2).
        expert_rank (`int`, *optional*):
            The experts share the dense FFN and differ from it by matrices of this rank; by default they are whole FFNs.
        use_residual (`bool`, *optional*, defaults to `False`): keep the dense FFN beside the experts.
    """

    moe_layers: list[str] | None = None
    num_experts: int = 4
    num_experts_per_tok: int = 2
    expert_rank: int | None = None
    use_residual: bool = False
