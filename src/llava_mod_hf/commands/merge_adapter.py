"""`llava-mod merge-adapter`: an adapter and its student → a student."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from peft import PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open

from llava_mod_hf.commands.parts import load_without_adapter
from llava_mod_hf.loading import resolve
from llava_mod_hf.training.hub_pushes import ADAPTER_FILE
from llava_mod_hf.training.output_folder import check_output_dir, copy_records, save_checkpoint

OPTIONS = ("commands.merge_adapter:MergeAdapterCommand",)


@dataclass
class MergeAdapterCommand:
    """
    Args:
        adapter (`str`): folder of a run with `use_peft`, or of another adapter of peft.
        output_dir (`str`): where the student goes.
        student (`str`, *optional*): that it is an adapter of, by default the one that its folder names.
        dtype (`str`, *optional*, defaults to `"auto"`): of the student's weights; by default as they are stored.
        trust_remote_code (`bool`, *optional*, defaults to `False`).
    """

    adapter: str = field(metadata={"help": "folder of an adapter"})
    output_dir: str = field(metadata={"help": "where the student goes"})
    student: str | None = None
    dtype: str = "auto"
    trust_remote_code: bool = False


def run(args: MergeAdapterCommand):
    """An adapter → the student with it inside, which loads without peft, and is upcycled, exported and published."""
    check_output_dir(args.output_dir)
    folder = Path(args.adapter)
    if not (folder / ADAPTER_FILE).is_file():
        raise ValueError(f"`{folder}` has no {ADAPTER_FILE}: give the folder of a run with `use_peft`.")
    named = json.loads((folder / ADAPTER_FILE).read_text(encoding="utf-8")).get("base_model_name_or_path")
    name = args.student or named
    if not name:
        raise ValueError(f"`{folder}` does not name the student that it is an adapter of: give `student`.")
    model, processor = load_without_adapter(resolve(name), dtype=args.dtype, trust_remote_code=args.trust_remote_code)
    try:
        adapted = PeftModel.from_pretrained(model, folder)
    except RuntimeError as error:  # weights of another shape, a line for each
        raise ValueError(
            f"`{folder}` is no adapter of `{name}` ({' '.join(str(error).split())[:300]}): give its `student`."
        ) from error
    _check_whole(adapted, folder, name)
    save_checkpoint(adapted.merge_and_unload(safe_merge=True), processor, args.output_dir)
    copy_records(folder, args.output_dir)


def _check_whole(model, folder, name):
    """peft warns of weights that have no place, or none, and goes on without them."""
    with safe_open(folder / SAFETENSORS_WEIGHTS_NAME, framework="pt") as file:
        stored = set(file.keys())
    other = sorted(stored ^ get_peft_model_state_dict(model).keys())
    if other:
        raise ValueError(
            f"`{folder}` is no adapter of `{name}`, or not whole: {len(other)} weights are in one of the two alone, "
            f"`{other[0]}` among them. Give its `student`."
        )
