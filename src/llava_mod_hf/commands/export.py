"""`llava-mod export`: student → stock model, without its code, or files for another runtime."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from llava_mod_hf.commands.parts import load_without_adapter
from llava_mod_hf.students.gguf_export import check_gguf, export_gguf
from llava_mod_hf.students.onnx_export import export_onnx
from llava_mod_hf.students.stock_export import MERGES, export_stock, merge_experts
from llava_mod_hf.students.web_export import check_web, export_web
from llava_mod_hf.training.output_folder import check_output_dir, save_checkpoint

GRAPHS = ("onnx", "web")
FORMS = ("stock", *MERGES, "gguf", *GRAPHS)

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
            student, a dense one or a stock LLaVA. `web`: a page that asks it about pictures in the browser, with that
            folder.
        results (`str`, *optional*): with `load`, the `results.json` of `llava-mod evaluate`, which has the shares.
        gguf_type (`str`, *optional*, defaults to `"f16"`): with `gguf`, the type of the matrices: f32, f16, q8_0, q4_0.
        onnx_dtypes (`list[str]`, *optional*, defaults to `fp32`):
            With `onnx` and `web`, files of which weights: `fp32`, `fp16`, `q8`, `q4`; the first is loaded where nobody
            asks for another.
        runtime (`str`, *optional*):
            With `web`, a folder where `npm install @huggingface/transformers` was run: the page gets a copy and works
            offline. By default it imports the library from a CDN.
        trust_remote_code (`bool`, *optional*, defaults to `False`).
    """

    model: str = field(metadata={"help": "a sparse student"})
    output_dir: str = field(metadata={"help": "where the exported model goes"})
    form: str = field(metadata={"help": "stock, uniform, load, gguf, onnx or web"})
    results: str | None = None
    gguf_type: str | None = None
    onnx_dtypes: list[str] | None = None
    runtime: str | None = None
    trust_remote_code: bool = False


def run(args: ExportCommand):
    """A student → a stock model that loads without its code, or a file for another runtime."""
    if args.form not in FORMS:
        raise ValueError(f"`form` is {args.form!r}: give one of {', '.join(FORMS)}.")
    _check_options(args)
    dtypes = args.onnx_dtypes or ["fp32"]
    if args.form in GRAPHS:
        check_web(args.output_dir, dtypes, args.runtime)
    else:
        check_output_dir(args.output_dir)
    if args.form == "gguf":
        check_gguf(args.output_dir, args.gguf_type or "f16")
    dtype = "float32" if args.form in GRAPHS else "auto"
    model, processor = load_without_adapter(args.model, dtype=dtype, trust_remote_code=args.trust_remote_code)
    if args.form == "onnx":
        export_onnx(model, processor, args.output_dir, dtypes=dtypes)
    elif args.form == "web":
        export_web(model, processor, args.output_dir, dtypes=dtypes, runtime=args.runtime)
    elif args.form == "gguf":
        export_gguf(model, processor, args.output_dir, gguf_type=args.gguf_type or "f16")
    elif args.form == "stock":
        save_checkpoint(export_stock(model), processor, args.output_dir)
    else:
        loads = json.loads(Path(args.results).read_text()).get("expert_load", {}) if args.results else None
        save_checkpoint(merge_experts(model, weights=args.form, loads=loads), processor, args.output_dir)


def _check_options(args):
    """
    Raises:
        ValueError: if an option is given to a form that has no use for it, or `load` has no shares.
    """
    if (args.results is not None) != (args.form == "load"):
        raise ValueError(f"`--results` is {args.results!r} with `--form {args.form}`: the form `load` alone needs it.")
    for name, forms in {"gguf_type": ("gguf",), "onnx_dtypes": GRAPHS, "runtime": ("web",)}.items():
        value = getattr(args, name)
        if value is not None and args.form not in forms:
            having = " and ".join(f"`{form}`" for form in forms)
            raise ValueError(f"`--{name}` is {value!r} with `--form {args.form}`: only {having} has it.")
