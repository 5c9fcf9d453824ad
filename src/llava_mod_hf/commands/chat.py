"""`llava-mod chat`: talk to a model about pictures, in the terminal."""

import sys
from dataclasses import dataclass, field

from accelerate import PartialState

from llava_mod_hf.loading import load_model_and_processor
from llava_mod_hf.talking.conversation import Conversation, read_picture
from llava_mod_hf.talking.terminal import Terminal

OPTIONS = ("talking.sampling:Sampling", "commands.chat:ChatCommand")

POSITIONAL = "model"  # what a first argument without a name is


@dataclass
class ChatCommand:
    """
    Args:
        model (`str`): the LLaVA to talk to.
        image (`str`, *optional*): a picture that the first question is about.
        dtype (`str`, *optional*, defaults to `"float32"`): of the model's weights in memory.
        device (`str`, *optional*): where they go, as transformers' `device_map`; by default a GPU if there is one.
        trust_remote_code (`bool`, *optional*, defaults to `False`).
    """

    model: str = field(metadata={"help": "the LLaVA to talk to"})
    image: str | None = None
    dtype: str = "float32"
    device: str | None = None
    trust_remote_code: bool = False


def load(args, name):
    """`(model, processor)` by name, where it answers, by the options of those who talk to it."""
    model, processor = load_model_and_processor(
        name, dtype=args.dtype, device=args.device, trust_remote_code=args.trust_remote_code
    )
    return (model.to(PartialState().device) if args.device is None else model), processor


def run(sampling, args):
    """
    Answers questions about pictures: at a terminal until `/quit`, else a line of standard input each.

    Raises:
        ValueError: if model or picture cannot be read, and, of a pipe, at the first line that cannot be taken.
    """
    picture = None if args.image is None else read_picture(args.image)  # before a model is loaded
    conversation = Conversation(*load(args, args.model))
    if picture is not None:
        conversation.show(picture)
    terminal = Terminal(conversation, sampling)
    if sys.stdin.isatty():
        terminal.interact()
    else:
        terminal.pipe(sys.stdin)
