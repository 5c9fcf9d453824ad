"""
Bytes per response token of a teacher's cache, and how far the loss from it is from the live one, for several k.

    python benchmarks/teacher_cache.py --rows 2000

The embedded teacher's answers to the mixture are cached by `llava-mod cache-teacher` with k = 8, 32, 128 and the whole
vocabulary. The student is a new one of the embedded language model with a random adaptor, or `--student`. Per response
token and in nats: the full divergence, the mean absolute difference of the cache's, and the mean mass beyond the k.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from datasets import disable_progress_bars
from torch.utils.data import DataLoader

from llava_mod_hf import MimicConfig, build_student
from llava_mod_hf.commands.arguments import DistillArguments, UpcycleArguments
from llava_mod_hf.commands.cache_teacher import CacheCommand, response_collator
from llava_mod_hf.commands.cache_teacher import run as run_cache_teacher
from llava_mod_hf.data.arguments import DataArguments
from llava_mod_hf.data.load import load_rows
from llava_mod_hf.loading import load_model_and_processor
from llava_mod_hf.losses.divergences import divergence_rows, top_k_forward_kl
from llava_mod_hf.losses.rows import shift_for_next_token
from llava_mod_hf.teachers.cached_teacher import CachedTeacher
from llava_mod_hf.training.run_folder import save_checkpoint

TEACHER = "embedded:tiny-teacher"


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--student", help="a checkpoint; by default a new student")
    parser.add_argument("--temperature", type=float, default=1.0)
    options = parser.parse_args()
    disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(options, Path(folder)), indent=1))


@torch.no_grad()
def measure(options, folder):
    if options.student is None:
        options.student = str(folder / "student")
        save_checkpoint(*build_student(TEACHER, "embedded:tiny-student-lm"), options.student)
    data = DataArguments(dataset_name="embedded:easy-vqa", dataset_config="mixture", max_samples=options.rows)
    args = MimicConfig(
        output_dir=str(folder / "run"),
        per_device_train_batch_size=64,
        temperature=options.temperature,
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )
    caches = {}
    for name, k, dtype in (
        ("8", 8, "float16"),
        ("32", 32, "float16"),
        ("128", 128, "float16"),
        ("all", 10**6, "float16"),
        ("all, float32", 10**6, "float32"),
    ):
        distill = DistillArguments(student=options.student, teacher=TEACHER, teacher_cache=str(folder / name))
        run_cache_teacher(data, distill, UpcycleArguments(), args, CacheCommand(top_k=k, log_probs_dtype=dtype))
        caches[name] = CachedTeacher(str(folder / name))

    student, processor = load_model_and_processor(options.student)
    teacher, _ = load_model_and_processor(TEACHER)
    rows = load_rows(data, columns=("prompt", "completion"), seed=args.seed)
    collator = response_collator(processor, args, rows.column_names)
    tokens, full_sum, sums = 0, 0.0, {name: [0.0, 0.0] for name in caches}
    for examples in DataLoader(rows, batch_size=64, collate_fn=list):
        batch = collator([dict(example) for example in examples])
        labels = batch.pop("labels")
        keep, _ = shift_for_next_token(labels)
        logits = student(**batch, logits_to_keep=keep).logits
        full = divergence_rows(logits, teacher(**batch, logits_to_keep=keep).logits, temperature=options.temperature)
        tokens, full_sum = tokens + len(full), full_sum + full.sum().item()
        for name, cache in caches.items():
            answer = cache.rows({}, cache.collate(examples, {"labels": labels}), labels)
            found = top_k_forward_kl(logits, answer.index, answer.log_probs, temperature=options.temperature)
            sums[name][0] += (found - full).abs().sum().item()
            sums[name][1] += (1 - answer.log_probs.exp().sum(-1)).clamp(min=0).sum().item()
    result = {
        "rows": len(rows),
        "response_tokens": tokens,
        "full_kl": full_sum / tokens,
        "vocabulary": logits.shape[-1],
    }
    for name, (error, rest) in sums.items():
        size = sum(path.stat().st_size for path in Path(caches[name].folder).glob("*.parquet"))
        result[f"k = {name}"] = {
            "bytes_per_token": round(size / tokens, 1),
            "kl_error": error / tokens,
            "mass_beyond_k": rest / tokens,
        }
    return result


if __name__ == "__main__":
    main()
