"""`llava-mod convert`: checkpoint of another layout → student."""

from dataclasses import dataclass, field

from llava_mod_hf.students.conversion import convert_checkpoint
from llava_mod_hf.training.output_folder import check_output_dir, save_checkpoint

OPTIONS = ("commands.convert:ConvertCommand",)


@dataclass
class ConvertCommand:
    """
    Args:
        checkpoint (`str`): folder in the layout of LLaVA-MoD, MoE-LLaVA or LLaVA-1.5, or of a stock LLaVA.
        output_dir (`str`): where the student goes.
        vision_tower (`str`, *optional*): vision encoder, by default the one that the checkpoint's config names.
        tokenizer (`str`, *optional*): by default the checkpoint's.
        conversation (`str`, *optional*): prompt template, such as `qwen` or `v1`; by default the family's.
        chat_template_path (`str`, *optional*): Jinja template instead of that of a conversation.
        dtype (`str`, *optional*): of the weights; by default as they are stored.
    """

    checkpoint: str = field(metadata={"help": "folder of a checkpoint in another layout"})
    output_dir: str = field(metadata={"help": "where the student goes"})
    vision_tower: str | None = None
    tokenizer: str | None = None
    conversation: str | None = None
    chat_template_path: str | None = None
    dtype: str | None = None


def run(args: ConvertCommand):
    """A checkpoint of another layout → a student of this package."""
    check_output_dir(args.output_dir)
    options = {name: value for name, value in vars(args).items() if name != "output_dir"}
    model, processor = convert_checkpoint(options.pop("checkpoint"), **options)
    save_checkpoint(model, processor, args.output_dir)
