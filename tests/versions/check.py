"""
Saved students load, compute and answer the same in every minor version of transformers, without this package.

    python tests/versions/check.py [VERSION ...]

Each version is installed by pip into a folder under `.venv/versions`; torch and the rest are those of this environment.
Without arguments: the newest patch of every minor from `LOWEST_TRANSFORMERS` to the newest on the package index.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from answer import answer, prepare
from releases import install, released
from safetensors.torch import load_file, save_file

from helpers.models import image_batch, sharpen
from helpers.tiny import make_processor, make_student
from llava_mod_hf.commands.pretrain import train_tokenizer
from llava_mod_hf.model.configuration_llava_mod import LOWEST_TRANSFORMERS
from llava_mod_hf.students.router_bias import add_router_bias, router_biases


def run(paths, *arguments):
    path = os.pathsep.join(map(str, paths))
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )


def save_students(folder):
    """Six students under `folder`, and what they compute here: `{name: (tensors, sums of what a processor makes)}`."""
    tokenizer = train_tokenizer(384)
    processor, expected = make_processor(tokenizer), {}
    for family in ("llama", "qwen2"):
        for kind, layers in (("dense", ()), ("sparse", (0, 2)), ("biased", (0, 2))):
            name = f"{family}-{kind}"
            student = sharpen(make_student(tokenizer, layers, family))
            if kind == "biased":
                add_router_bias(student)
                for bias in router_biases(student):
                    bias.copy_(torch.tensor([0.3, -0.3, 0.1, 0.0]))
            student.save_pretrained(folder / name)
            processor.save_pretrained(folder / name)
            inputs = image_batch(processor, ["is there a red circle?", "what is it?"])
            save_file({key: value.contiguous() for key, value in inputs.items()}, folder / name / "inputs.safetensors")
            processed = {key: value.float().sum().item() for key, value in prepare(folder / name).items()}
            expected[name] = (answer(folder / name), processed)
    return expected


def differences(folder, expected, processed):
    """What a version computes otherwise, in words."""
    tensors, inputs = expected
    found = load_file(folder / "found.safetensors")
    wrong = sorted(found.keys() ^ tensors.keys())
    for key, value in tensors.items():
        if key not in found:
            continue
        if value.is_floating_point():
            same = torch.allclose(found[key], value, rtol=0, atol=1e-5 * value.abs().max().item())
        else:
            same = torch.equal(found[key], value)
        wrong += [] if same else [key]
    if processed != inputs:
        wrong.append(f"processor ({processed})")
    return [f"{folder.name}: {part}" for part in wrong]


def check(version, folders, expected):
    """What a version computes otherwise of the students in `folders`; each then holds `again`, as it saves them."""
    for folder in folders:
        shutil.rmtree(folder / "again", ignore_errors=True)
    done = run(install(version), Path(__file__).parent / "answer.py", *folders)
    if done.returncode:
        return [done.stderr.strip().splitlines()[-1]]
    wrong = []
    for folder, line, values in zip(folders, done.stdout.splitlines(), expected, strict=True):
        wrong += differences(folder, values, json.loads(line)["processed"])
    return wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("versions", nargs="*", help="by default, one of every minor")
    versions = parser.parse_args().versions or released(f">={LOWEST_TRANSFORMERS}")
    failed = []

    def report(label, wrong):
        failed.extend([label] if wrong else [])
        sys.stdout.write(f"transformers {label}: {'; '.join(wrong) or 'the same'}\n")
        sys.stdout.flush()

    with tempfile.TemporaryDirectory() as root:
        students = save_students(Path(root))
        folders, expected = [Path(root) / name for name in students], list(students.values())
        for version in versions:
            report(version, check(version, folders, expected))
        if not failed:
            again = [folder / "again" for folder in folders]
            report(f"{versions[0]}, saved by {versions[-1]}", check(versions[0], again, expected))
    if failed:
        raise SystemExit(f"Students do not load the same in transformers {'; '.join(failed)}.")


if __name__ == "__main__":
    main()
