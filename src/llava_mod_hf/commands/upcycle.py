"""`llava-mod upcycle`: dense student → sparse student."""

from dataclasses import dataclass, field

from llava_mod_hf.commands.arguments import UpcycleArguments
from llava_mod_hf.commands.parts import load_without_adapter, upcycle_student
from llava_mod_hf.training.output_folder import check_output_dir, copy_records, save_checkpoint

OPTIONS = ("commands.arguments:UpcycleArguments", "commands.upcycle:UpcycleCommand")


@dataclass
class UpcycleCommand:
    """
    Args:
        student (`str`): a dense LLaVA of this package or of transformers.
        output_dir (`str`): where the sparse student goes.
        seed (`int`, *optional*, defaults to 0): of the routers.
        trust_remote_code (`bool`, *optional*, defaults to `False`).
    """

    student: str = field(metadata={"help": "a dense LLaVA"})
    output_dir: str = field(metadata={"help": "where the sparse student goes"})
    seed: int = 0
    trust_remote_code: bool = False


def run(upcycle_args: UpcycleArguments, args: UpcycleCommand):
    """Dense student → sparse student with the same logits."""
    check_output_dir(args.output_dir)
    student, processor = load_without_adapter(args.student, trust_remote_code=args.trust_remote_code)
    upcycle_args.moe_layers = upcycle_args.moe_layers or ["alternate"]
    save_checkpoint(upcycle_student(student, upcycle_args, seed=args.seed), processor, args.output_dir)
    copy_records(args.student, args.output_dir)
