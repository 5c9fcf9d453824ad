"""
Size and error of students with weights of 8 and 4 bits.

    python benchmarks/quantisation.py [--student FOLDER] [--bits 8 4] [--json]

Without `--student`, a student with random weights of Qwen2-0.5B's width (896, experts of 4,864) and two layers, one of
them with experts. Each is compared in float32 with the student as it is, on random tokens: `error` is the norm of the
difference of the logits over the norm of the logits, `kl` the mean divergence of the next-token distributions in nats,
`same choice` the share of positions with the same most likely token. `bfloat16` rounds all weights, for comparison.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForImageTextToText, CLIPVisionConfig, Qwen2Config

from llava_mod_hf import LlavaModConfig, LlavaModForConditionalGeneration
from llava_mod_hf.loading import resolve
from llava_mod_hf.students.quantisation import bytes_in_memory, load_quantised


def random_student(folder):
    """Saves the student with random weights: experts differ, and logits are of the size that trained ones are."""
    torch.manual_seed(0)
    config = LlavaModConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=16,
        ),
        text_config=Qwen2Config(
            vocab_size=4096,
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=2,
            num_attention_heads=14,
            num_key_value_heads=2,
            initializer_range=896**-0.5,
            tie_word_embeddings=True,
        ),
        moe_layers=[0],
    )
    LlavaModForConditionalGeneration._from_config(config).save_pretrained(folder)


def bytes_on_disk(folder):
    return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


def compare(name, model, tokens, expected, disk):
    """A row of the table."""
    memory = bytes_in_memory(model)  # before the first forward: bitsandbytes repacks some layers then
    with torch.no_grad():
        logits = model(tokens).logits.float()
    log_p, log_q = expected.log_softmax(-1), logits.log_softmax(-1)
    return {
        "weights": name,
        "bytes_on_disk": disk,
        "bytes_in_memory": memory,
        "error": ((logits - expected).norm() / expected.norm()).item(),
        "kl": (log_p.exp() * (log_p - log_q)).sum(-1).mean().item(),
        "same_choice": (logits.argmax(-1) == expected.argmax(-1)).float().mean().item(),
    }


def measure(student, bits, num_tokens=256):
    """Rows for the student as it is, in bfloat16, and with each of `bits`."""
    student = resolve(student)
    model = AutoModelForImageTextToText.from_pretrained(student, dtype="float32")
    generator = torch.Generator().manual_seed(1)
    size = model.config.image_token_id  # random tokens, but not the image's
    ids = torch.randint(0, model.config.get_text_config().vocab_size - 1, (4, num_tokens // 4), generator=generator)
    ids += (ids >= size).to(ids.dtype)
    with torch.no_grad():
        expected = model(ids).logits
    rows = [compare("float32", model, ids, expected, bytes_on_disk(student))]
    with tempfile.TemporaryDirectory() as folder:
        rounded = model.to(torch.bfloat16)
        rounded.save_pretrained(f"{folder}/bfloat16")
        memory = bytes_in_memory(rounded)
        row = compare("bfloat16", rounded.float(), ids, expected, bytes_on_disk(f"{folder}/bfloat16"))
        rows.append(row | {"bytes_in_memory": memory})
        for count in bits:
            quantised = load_quantised(student, bits=count, dtype="float32")
            disk = None
            if count == 8:  # 4 bits are packed after loading, and cannot be saved
                quantised.save_pretrained(f"{folder}/{count}")
                disk = bytes_on_disk(f"{folder}/{count}")
            rows.append(compare(f"{count} bits", quantised, ids, expected, disk))
    return rows


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", help="by default one with random weights")
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4])
    parser.add_argument("--json", action="store_true", help="write JSON instead of a table")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        if args.student is None:
            random_student(folder)
        rows = measure(args.student or folder, args.bits)
    if args.json:
        sys.stdout.write(json.dumps(rows, indent=1) + "\n")
        return rows
    table = Table("weights", "on disk", "in memory", "error", "kl", "same choice")
    for row in rows:
        disk = "—" if row["bytes_on_disk"] is None else f"{row['bytes_on_disk'] / 1e6:.1f} MB"
        numbers = f"{row['error']:.4f}", f"{row['kl']:.5f}", f"{row['same_choice']:.3f}"
        table.add_row(row["weights"], disk, f"{row['bytes_in_memory'] / 1e6:.1f} MB", *numbers)
    Console().print(table)
    return rows


if __name__ == "__main__":
    main()
