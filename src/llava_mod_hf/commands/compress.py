"""`llava-mod compress`: sparse student → one with fewer experts, lighter weights, or both."""

import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch

from llava_mod_hf.commands.parts import load_without_adapter
from llava_mod_hf.publishing.provenance import COMPRESSION_FILE, compression_steps
from llava_mod_hf.students.compression import compress_experts
from llava_mod_hf.students.quantisation import bytes_in_memory, load_quantised, quantization_config
from llava_mod_hf.training.output_folder import check_output_dir, copy_records, save_checkpoint, write_json

OPTIONS = ("commands.compress:CompressCommand",)

DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class CompressCommand:
    """
    Args:
        model (`str`): a student.
        output_dir (`str`): where the smaller one goes.
        num_experts (`int`, *optional*): how many experts of each layer remain, those with the largest load.
        results (`str`, *optional*): with it, the `results.json` of `llava-mod evaluate`, which has the load.
        how (`str`, *optional*, defaults to `"drop"`): with it, what becomes of the others: `drop` or `merge`.
        bits (`int`, *optional*): 8: int8 in the decoder layers, by torchao.
        dtype (`str`, *optional*, defaults to the student's): of the rest: float32, bfloat16 or float16.
        trust_remote_code (`bool`, *optional*, defaults to `False`).
    """

    model: str = field(metadata={"help": "a student"})
    output_dir: str = field(metadata={"help": "where the smaller one goes"})
    num_experts: int | None = None
    results: str | None = None
    how: str | None = None
    bits: int | None = None
    dtype: str | None = None
    trust_remote_code: bool = False


def run(args: CompressCommand):
    """A student → a smaller one, with a note of what was done in its folder."""
    check_output_dir(args.output_dir)
    _check(args)
    model, processor = load_without_adapter(args.model, dtype="auto", trust_remote_code=args.trust_remote_code)
    note = {"megabytes_before": _megabytes(model)}
    if args.num_experts is not None and args.results is not None:  # both or neither
        loads = json.loads(Path(args.results).read_text()).get("expert_load", {})
        model, note["experts"] = compress_experts(
            model, loads=loads, num_experts=args.num_experts, how=args.how or "drop"
        )
    if args.dtype is not None:
        model, note["dtype"] = model.to(getattr(torch, args.dtype)), args.dtype
    if args.bits is not None:
        note["bits"] = args.bits
        with tempfile.TemporaryDirectory() as whole:
            dtype = str(model.dtype).removeprefix("torch.")
            model.save_pretrained(whole)
            model = load_quantised(whole, bits=args.bits, dtype=dtype, trust_remote_code=args.trust_remote_code)
    note["megabytes"] = _megabytes(model)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / COMPRESSION_FILE, {"steps": [*compression_steps(args.model), note]})
    save_checkpoint(model, processor, folder)
    copy_records(args.model, folder)


def _check(args):
    if args.num_experts is None and args.bits is None and args.dtype is None:
        raise ValueError("Nothing is to be made smaller: give `--num_experts`, `--bits`, `--dtype`, or several.")
    if (args.num_experts is None) != (args.results is None):
        raise ValueError(
            f"`--num_experts` is {args.num_experts} and `--results` is {args.results!r}: experts are left out by their "
            "measured load, so give both, the second from `llava-mod evaluate`, or neither."
        )
    if args.how is not None and args.num_experts is None:
        raise ValueError(f"`--how` is {args.how!r}, and all experts remain: give `--num_experts`, too.")
    if args.dtype is not None and args.dtype not in DTYPES:
        raise ValueError(f"`--dtype` is {args.dtype!r}: give one of {', '.join(DTYPES)}.")
    if args.bits is not None:
        if args.bits != 8:
            raise ValueError(
                f"`--bits` is {args.bits}: 8 can be saved; 4 are made whenever a student is loaded, by "
                "`load_quantised`, or in a file for llama.cpp, by `llava-mod export --form gguf --gguf_type q4_0`."
            )
        quantization_config(args.bits)  # whether its library is installed


def _megabytes(model):
    return round(bytes_in_memory(model) / 1e6, 3)
