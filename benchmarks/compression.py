"""
Size of a sparse student against its answers: half precision, 8 bits, fewer experts, and files for llama.cpp.

    python benchmarks/compression.py --model runs/quickstart/mimic_sparse [--questions 300]
    LLAMA_CPP=.venv/llama-cpp PYTHONPATH=.venv/llama-cpp/python:.venv/quantisation:tests \
        python benchmarks/compression.py --model runs/quickstart/mimic_sparse

Each form is written by `llava-mod compress` or `export`, loaded again, and asked questions of the scenes' test split;
`same answer` is the share that the student in float32 answers in the same words. The experts' load is measured on
training rows. Forms of 8 bits are left out without torchao, those of llama.cpp without LLAMA_CPP (`make test-gguf`).
"""

import argparse
import importlib.util
import json
import os
import tempfile
from pathlib import Path

import torch
from rich.console import Console

from llava_mod_cli import main as command
from llava_mod_hf import load_model_and_processor
from llava_mod_hf.data import scene_rows
from llava_mod_hf.evaluation.answers import generate_answers, score_answers
from llava_mod_hf.evaluation.questions import with_questions
from llava_mod_hf.evaluation.router_use import loads_of, router_use

FORMS = {
    "float32": ("compress", {"dtype": "float32"}),
    "bfloat16": ("compress", {"dtype": "bfloat16"}),
    "8 bits": ("compress", {"dtype": "bfloat16", "bits": 8}),
    "3 experts, others dropped": ("compress", {"dtype": "float32", "num_experts": 3}),
    "3 experts, others merged": ("compress", {"dtype": "float32", "num_experts": 3, "how": "merge"}),
    "2 experts, others dropped": ("compress", {"dtype": "float32", "num_experts": 2}),
    "2 experts, others merged": ("compress", {"dtype": "float32", "num_experts": 2, "how": "merge"}),
    "2 experts, others dropped, 8 bits": ("compress", {"dtype": "bfloat16", "num_experts": 2, "bits": 8}),
    "dense (`export --form load`)": ("export", {"form": "load"}),
    "llama.cpp, f32": ("export", {"form": "gguf", "gguf_type": "f32"}),
    "llama.cpp, f16": ("export", {"form": "gguf", "gguf_type": "f16"}),
    "llama.cpp, q8_0": ("export", {"form": "gguf", "gguf_type": "q8_0"}),
    "llama.cpp, q4_0": ("export", {"form": "gguf", "gguf_type": "q4_0"}),
}


def llama_cpp_answers(folder, rows, processor):
    """What llama.cpp says, in words."""
    from helpers import llama_cpp  # tests/helpers

    asked = []
    for row in rows:
        first, *later = row["prompt"]
        turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": first["content"]}]}, *later]
        prompt = processor.apply_chat_template(turns, add_generation_prompt=True)
        asked.append((prompt, row["images"][0]))
    files = [folder / "model.gguf", folder / "mmproj.gguf"]
    answers = llama_cpp.picture_answers(files, asked, folder, steps=64)
    return [processor.tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens, _ in answers]


def answers_of(name, options, model, rows, results, folder):
    """`(answers, megabytes)` of one form, written by its command and loaded again."""
    kind, values = options
    values = dict(values)
    if "num_experts" in values or values.get("form") == "load":
        values["results"] = results
    arguments = [str(part) for key, value in values.items() for part in (f"--{key}", value)]
    if command([kind, "--model", model, "--output_dir", str(folder), "--trust_remote_code", "true", *arguments]):
        raise SystemExit(f"`{name}` was refused")
    size = sum(path.stat().st_size for path in folder.glob("*") if path.suffix in (".safetensors", ".gguf")) / 1e6
    if values.get("form") == "gguf":
        return llama_cpp_answers(folder, rows, load_model_and_processor(model)[1]), size
    smaller, processor = load_model_and_processor(str(folder), dtype="auto")
    return generate_answers(smaller.eval(), processor, rows), size


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--model", required=True)
    parser.add_argument("--questions", type=int, default=300)
    args = parser.parse_args()
    console = Console()
    rows = with_questions(scene_rows.load("mixture", "test")).select(range(args.questions))
    model, processor = load_model_and_processor(args.model)
    training = with_questions(scene_rows.load("mixture", "train", options={"rows": 300}))
    loads = loads_of(router_use(model.eval(), processor, training))
    first = None
    console.print("| form | MB of weights | exact match | same answer |\n|---|---|---|---|")
    for name, options in FORMS.items():
        if "bits" in options[1] and importlib.util.find_spec("torchao") is None:
            continue
        if options[1].get("form") == "gguf" and "LLAMA_CPP" not in os.environ:
            continue
        with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
            results = Path(folder) / "results.json"
            results.write_text(json.dumps({"expert_load": loads}))
            answers, size = answers_of(name, options, args.model, rows, results, Path(folder) / "out")
        first = first or answers
        same = sum(one == other for one, other in zip(answers, first, strict=True)) / len(answers)
        exact = score_answers(answers, rows)["exact_match"]
        console.print(f"| {name} | {size:.2f} | {exact:.3f} | {same:.3f} |", soft_wrap=True)


if __name__ == "__main__":
    main()
