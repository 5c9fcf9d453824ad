"""
Seconds and peak memory of a preference step: how much of it is the reference.

    python benchmarks/preference_step.py [--json FILE] [--rounds 3] [--steps 6] [--width 256] [--layers 6]

A student with four experts in every second layer, a teacher of twice the width, the same vision encoder, images of 64
tokens; random weights, float32, `sigmoid`, pairs of easy-VQA. Every contender trains in a process of its own, in turns,
`--rounds` times; the fastest round counts. CPU seconds are those of all threads together. Memory is the highest
resident size above that before the models are loaded.

- `student`: TRL's `DPOTrainer` without any reference: the student's step alone.
- `precomputed`: `PreferenceTrainer` from what `llava-mod cache-reference` wrote.
- `live`: `PreferenceTrainer` with the teacher.
- `trl`: TRL's `DPOTrainer` with the teacher as `ref_model`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from measuring import MIB, add_json, measured, resident, write_json
from transformers import LlavaProcessor, Qwen2Config, SiglipVisionConfig
from trl import DPOTrainer

from llava_mod_hf import LlavaModConfig, LlavaModForConditionalGeneration, PreferenceConfig, PreferenceTrainer
from llava_mod_hf.commands.arguments import DistillArguments
from llava_mod_hf.commands.cache_reference import ReferenceCommand
from llava_mod_hf.commands.cache_reference import run as run_cache_reference
from llava_mod_hf.commands.pretrain import image_processor, train_tokenizer
from llava_mod_hf.data import easy_vqa
from llava_mod_hf.data.arguments import DataArguments
from llava_mod_hf.loading import load_model_and_processor
from llava_mod_hf.teachers.reference_model import REFERENCE_COLUMNS, CachedReference, NoReference
from llava_mod_hf.training.progress import StepTimer

CONTENDERS = ("student", "precomputed", "live", "trl")
IMAGE_SIZE, PATCH_SIZE = 128, 16


def make_models(folder, args):
    """Writes `student`, `teacher` and the cache of the teacher's log-probabilities."""
    tokenizer = train_tokenizer(384)
    processor = LlavaProcessor(
        image_processor=image_processor(IMAGE_SIZE),
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=tokenizer.chat_template,
        image_token="<image>",
    )
    torch.manual_seed(0)
    for name, factor, moe_layers in (("student", 1, range(0, args.layers, 2)), ("teacher", 2, ())):
        width = args.width * factor
        config = LlavaModConfig(
            vision_config=SiglipVisionConfig(
                hidden_size=128,
                intermediate_size=512,
                num_hidden_layers=4,
                num_attention_heads=4,
                image_size=IMAGE_SIZE,
                patch_size=PATCH_SIZE,
                vision_use_head=False,
            ),
            text_config=Qwen2Config(
                vocab_size=len(tokenizer),
                hidden_size=width,
                intermediate_size=4 * width,
                num_hidden_layers=args.layers,
                num_attention_heads=width // 64,
                num_key_value_heads=width // 64,
                tie_word_embeddings=True,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            ),
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            moe_layers=list(moe_layers),
        )
        LlavaModForConditionalGeneration(config).save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    run_cache_reference(
        DataArguments("embedded:easy-vqa", "preferences", max_samples=args.batch * args.steps),
        DistillArguments(
            student=str(folder / "student"), teacher=str(folder / "teacher"), teacher_cache=str(folder / "cache")
        ),
        config_of(folder, args),
        ReferenceCommand(),
    )


def config_of(folder, args):
    return PreferenceConfig(
        str(folder / "run"),
        train_modules=["vision_tower", "adaptor", "language_model"],  # all, as TRL's trainer does
        per_device_train_batch_size=args.batch,
        max_steps=args.steps,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )


def without_reference(collate):
    """Batches with zeros for the reference, for TRL's trainer to take as precomputed."""

    def collate_pairs(examples):
        pairs = len(examples)
        return {**collate(examples), **{name: torch.zeros(pairs) for name in REFERENCE_COLUMNS}}

    return collate_pairs


def measure(contender, folder, args):
    """Seconds of a step without the first, CPU seconds of one, and the peak of the whole training."""
    torch.set_num_threads(args.threads)
    rows = easy_vqa.load("preferences", "train", 0).select(range(args.batch * args.steps))
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    student, processor = load_model_and_processor(str(folder / "student"))
    reference = {
        "student": NoReference,
        "precomputed": lambda: CachedReference(str(folder / "cache")),
        "live": lambda: load_model_and_processor(str(folder / "teacher"))[0],
        "trl": lambda: load_model_and_processor(str(folder / "teacher"))[0],
    }[contender]()
    trainer_class = PreferenceTrainer if contender in ("precomputed", "live") else DPOTrainer
    trainer = trainer_class(student, reference, config_of(folder, args), train_dataset=rows, processing_class=processor)
    if contender == "student":
        trainer.data_collator, trainer.precompute_ref_logps = without_reference(trainer.data_collator), True
    timer = StepTimer()
    trainer.add_callback(timer)
    start = time.process_time()
    trainer.train()
    return {
        "seconds": timer.seconds_per_step(),
        "cpu_seconds": (time.process_time() - start) / args.steps,
        "peak_mib": (resident("VmHWM") - before) / MIB,
    }


def json_rows(rounds):
    """Every figure of every contender, beside the student's step alone and TRL's trainer in the same rounds."""
    figures = {"seconds": ("", "s"), "cpu_seconds": (": processor", "s"), "peak_mib": (": peak memory", "MiB")}
    of = {figure: {name: [one[figure] for one in found] for name, found in rounds.items()} for figure in figures}
    return [
        measured(f"{name}{added}", values, unit, {"floor": of[figure]["student"], "trl": of[figure]["trl"]})
        for figure, (added, unit) in figures.items()
        for name, values in of[figure].items()
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_json(parser)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help="of a round; the first does not count")
    parser.add_argument("--batch", type=int, default=4, help="pairs")
    parser.add_argument("--width", type=int, default=256, help="of the student; a multiple of 64")
    parser.add_argument("--layers", type=int, default=6, help="of both language models")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)  # in a process of its own
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender:
        sys.stdout.write(json.dumps(measure(args.contender, args.folder, args)))
        return
    options = [f"--{name}={getattr(args, name)}" for name in ("steps", "batch", "width", "layers", "threads")]
    rounds = {name: [] for name in CONTENDERS}
    with tempfile.TemporaryDirectory() as temporary:
        make_models(Path(temporary), args)
        for _ in range(args.rounds):
            for name, found in rounds.items():
                command = [sys.executable, __file__, "--contender", name, "--folder", temporary, *options]
                environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
                output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
                found.append(json.loads(output.splitlines()[-1]))
    results = {
        name: {figure: min(one[figure] for one in found) for figure in found[0]} for name, found in rounds.items()
    }
    sys.stdout.write(
        f"{args.batch} pairs a step, widths {args.width} and {2 * args.width}, {args.layers} layers, "
        f"{args.threads} threads, best of {args.rounds} rounds of {args.steps} steps\n"
        f"{'':>12} {'seconds':>8} {'ratio':>6} {'CPU s':>8} {'ratio':>6} {'peak MiB':>9} {'ratio':>6}\n"
    )
    for name, found in results.items():
        found |= {f"{figure}_ratio": found[figure] / results["student"][figure] for figure in list(found)}
        cells = [found["seconds"], found["seconds_ratio"], found["cpu_seconds"], found["cpu_seconds_ratio"]]
        sys.stdout.write(
            "{:>12} {:8.3f} {:6.2f} {:8.3f} {:6.2f} {:9.0f} {:6.2f}\n".format(
                name, *cells, found["peak_mib"], found["peak_mib_ratio"]
            )
        )
    write_json(args.json, __file__, json_rows(rounds), threads=args.threads)


if __name__ == "__main__":
    main()
