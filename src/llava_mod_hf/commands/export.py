"""`llava-mod export`: student → stock model, without its code."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from llava_mod_hf.commands.parts import load_without_adapter
from llava_mod_hf.students.gguf_export import check_gguf, export_gguf
from llava_mod_hf.students.onnx_export import check_can_write, export_onnx
from llava_mod_hf.students.stock_export import MERGES, export_stock, merge_experts
from llava_mod_hf.training.run_folder import check_output_dir, save_checkpoint

FORMS = ("stock", *MERGES, "gguf", "onnx")

OPTIONS = ("commands.export:ExportCommand",)


@dataclass
class ExportCommand:
    """
    Args:
        model (`str`): a sparse student.
        output_dir (`str`): where the exported model goes.
        form (`str`):
            `stock`: the same student as a mixture of experts of transformers. `uniform`, `load`: a dense model with the
            experts averaged, equally or by their share of the routers' choices. `gguf`: a file for llama.cpp, of a
            student with or without experts. `onnx`: the folder of graphs that transformers.js loads, of a sparse
            student, a dense one or a stock LLaVA.
        results (`str`, *optional*): with `load`, the `results.json` of `llava-mod evaluate`, which has the shares.
        gguf_type (`str`, *optional*, defaults to `"f16"`): with `gguf`, the type of the matrices: f32, f16, q8_0, q4_0.
        trust_remote_code (`bool`, *optional*, defaults to `False`).
    """

    model: str = field(metadata={"help": "a sparse student"})
    output_dir: str = field(metadata={"help": "where the exported model goes"})
    form: str = field(metadata={"help": "stock, uniform, load, gguf or onnx"})
    results: str | None = None
    gguf_type: str | None = None
    trust_remote_code: bool = False


def run(args: ExportCommand):
    """A student → a stock model that loads without its code, or a file for another runtime."""
    if args.form not in FORMS:
        raise ValueError(f"`form` is {args.form!r}: give one of {', '.join(FORMS)}.")
    (check_can_write if args.form == "onnx" else check_output_dir)(args.output_dir)
    if args.gguf_type is not None and args.form != "gguf":
        raise ValueError(f"`--gguf_type` is {args.gguf_type!r} with `--form {args.form}`: only `gguf` has it.")
    if (args.results is not None) != (args.form == "load"):
        raise ValueError(f"`--results` is {args.results!r} with `--form {args.form}`: the form `load` alone needs it.")
    if args.form == "gguf":
        check_gguf(args.output_dir, args.gguf_type or "f16")
    dtype = "float32" if args.form == "onnx" else "auto"
    model, processor = load_without_adapter(args.model, dtype=dtype, trust_remote_code=args.trust_remote_code)
    if args.form == "onnx":
        return export_onnx(model, processor, args.output_dir)
    if args.form == "gguf":
        export_gguf(model, processor, args.output_dir, gguf_type=args.gguf_type or "f16")
        return None
    if args.form == "stock":
        exported = export_stock(model)
    else:
        loads = json.loads(Path(args.results).read_text()).get("expert_load", {}) if args.results else None
        exported = merge_experts(model, weights=args.form, loads=loads)
    save_checkpoint(exported, processor, args.output_dir)
