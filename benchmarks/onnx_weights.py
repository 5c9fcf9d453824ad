"""
What lighter ONNX weights cost: size, gap of the logits, and answers beside PyTorch's.

    make test-onnx  # installs what writes and runs the graphs
    PYTHONPATH=.venv/onnx .venv/bin/python benchmarks/onnx_weights.py --model embedded:scenes-teacher

Questions are those of the scenes' test set, or of easy-VQA's. Each line of standard output is a row of the table in
docs/export.md: kind, megabytes, largest gap of a logit as a share of the largest logit, answers that are PyTorch's
token by token, and answers that are right.
"""

import argparse
import io
import tempfile
from pathlib import Path

import numpy as np
import torch

from llava_mod_hf import load_model_and_processor
from llava_mod_hf.data import easy_vqa, scene_rows
from llava_mod_hf.publishing.fresh_process import conversation
from llava_mod_hf.students.onnx_export import export_onnx
from llava_mod_hf.students.onnx_reader import OnnxStudent
from llava_mod_hf.students.onnx_weights import DTYPES


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file


def questions(world, samples):
    """`[{image, question, answer}]`, the pictures as paths or files in memory."""
    if world == "scenes":
        rows = scene_rows.load("mixture", "test", options={"rows": 2 * samples})
        rows = [row for row in rows if len(row["prompt"]) == 1][:samples]  # without conversations
        return [row | {"image": png(row["images"][0])} for row in rows]
    paths, rows = easy_vqa.image_paths("test"), easy_vqa.questions("test")
    return [row | {"image": paths[row["image_id"]]} for row in rows[:: len(rows) // samples][:samples]]


@torch.no_grad()
def reference(model, processor, rows, limit):
    """Per row: the inputs as arrays, PyTorch's logits and its greedy tokens."""
    for row in rows:
        inputs = processor.apply_chat_template(
            conversation(row), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        tokens = model.generate(**inputs, max_new_tokens=limit, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        yield {name: value.numpy() for name, value in inputs.items()}, model(**inputs).logits.numpy(), tokens.tolist()


def right(processor, tokens, answer):
    return processor.decode(tokens, skip_special_tokens=True).strip() == answer


def measure(reader, expected, rows, limit):
    largest, gap, same, correct = 0.0, 0.0, 0, 0
    for (arrays, logits, tokens), row in zip(expected, rows, strict=True):
        largest = max(largest, np.abs(logits).max())
        gap = max(gap, np.abs(reader.logits(**arrays) - logits).max())
        found = reader.generate(**arrays, max_new_tokens=limit)[0][0].tolist()
        same += found == tokens
        correct += right(reader.processor, found, row["answer"])
    return f"{gap / largest:.1e}", same, correct


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded:scenes-teacher")
    parser.add_argument("--world", choices=("scenes", "easy-vqa"), default="scenes")
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--max_new_tokens", type=int, default=8)
    parser.add_argument("--trust_remote_code", action="store_true")
    args = parser.parse_args()
    model, processor = load_model_and_processor(args.model, trust_remote_code=args.trust_remote_code)
    model.eval()
    rows = questions(args.world, args.samples)
    expected = list(reference(model, processor, rows, args.max_new_tokens))
    correct = sum(right(processor, tokens, row["answer"]) for (_, _, tokens), row in zip(expected, rows, strict=True))
    parameters = 4e-6 * sum(parameter.numel() for parameter in model.parameters())
    print(f"| PyTorch, float32 | {parameters:.2f} | | | {correct} of {len(rows)} |")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder, "onnx")
        export_onnx(model, processor, folder, dtypes=tuple(DTYPES))
        graphs = {path.stem for path in (folder / "onnx").iterdir()}
        for dtype, end in DTYPES.items():
            names = [name for name in graphs if name.endswith(end) and (end or f"{name}_q4" in graphs)]
            size = sum((folder / f"onnx/{name}.onnx").stat().st_size for name in names) / 1e6
            gap, same, correct = measure(OnnxStudent(folder, dtype=dtype), expected, rows, args.max_new_tokens)
            print(f"| {dtype} | {size:.2f} | {gap} | {same} of {len(rows)} | {correct} of {len(rows)} |", flush=True)


if __name__ == "__main__":
    main()
