"""`llava-mod demo`: a page on which a model answers questions about pictures, beside its teacher."""

import sys
from dataclasses import dataclass, field

from llava_mod_hf.commands.chat import load

OPTIONS = ("talking.sampling:Sampling", "commands.demo:DemoCommand")

POSITIONAL = "model"  # what a first argument without a name is


@dataclass
class DemoCommand:
    """
    Args:
        model (`str`): the LLaVA that answers, and whose experts are shown.
        teacher (`str`, *optional*): answers the same question after it, beside it.
        host (`str`, *optional*, defaults to `"127.0.0.1"`): where the page is; another than this lets others see it.
        port (`int`, *optional*, defaults to 7860): 0 takes one that is free.
        share (`bool`, *optional*, defaults to `False`): a public address, through Gradio's servers.
        dtype (`str`, *optional*, defaults to `"float32"`): of the models' weights in memory.
        device (`str`, *optional*): where they go, as transformers' `device_map`; by default a GPU if there is one.
        trust_remote_code (`bool`, *optional*, defaults to `False`).
    """

    model: str = field(metadata={"help": "the LLaVA that answers"})
    teacher: str | None = None
    host: str = "127.0.0.1"
    port: int = 7860
    share: bool = False
    dtype: str = "float32"
    device: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self):
        if self.teacher is not None and self.teacher == self.model:
            raise ValueError(f"`teacher` is `{self.teacher}`, as `model` is: give another, or leave it out.")
        if not 0 <= self.port < 65536:
            raise ValueError(f"`port` is {self.port}: give one from 1 to 65535, or 0 for a free one.")


def run(sampling, args):
    """
    Serves the page until the process ends.

    Raises:
        ValueError: if Gradio is not installed, a model cannot be loaded, or the page cannot be served there.
    """
    try:
        from llava_mod_hf.talking.page import build_page, serve
    except ImportError as error:
        raise ValueError(
            f"The page needs Gradio ({' '.join(str(error).split())}): install `llava-mod-hf[demo]`."
        ) from error
    names = [name for name in (args.model, args.teacher) if name is not None]
    page = build_page({name: load(args, name) for name in names}, sampling)
    address = serve(page, host=args.host, port=args.port, share=args.share)
    sys.stdout.write(f"The page is at {address}; Ctrl-C ends it.\n")
    sys.stdout.flush()
    page.block_thread()
