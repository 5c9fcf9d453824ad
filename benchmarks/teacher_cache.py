"""
Bytes per response token of a teacher's cache, and how far loss and gradient from it are from the live ones.

    python benchmarks/teacher_cache.py --rows 2000 [--json FILE]

The embedded teacher's answers to the mixture are cached by `llava-mod cache-teacher`: the 8, 32, 128 most likely
tokens, the whole vocabulary, and samples of 12, 50 and 200 tokens. The student is a new one of the embedded language
model with a random adaptor, or `--student`. Per response token and in nats: the full divergence, the mean difference of
the cache's, and the mean mass beyond the k. Of the gradient by the student's logits, its error as a share of the full
one's size: in the mean of single tokens, and of the sum over all of them, in which what is random averages out and what
is biased stays.
`read` is response tokens a processor second, from the files to tensors. In the JSON, its floor is reading the same
Parquet files, and `live` the teacher's own forward passes, `--rounds` times in turns.
"""

import argparse
import json
import tempfile
import time
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import torch
from datasets import disable_progress_bars
from measuring import add_json, in_turns, measured, write_json
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
from llava_mod_hf.training.output_folder import save_checkpoint

TEACHER = "embedded:tiny-teacher"

WAYS = {
    **{f"top {k}": {"top_k": k} for k in (8, 32, 128)},
    "all": {"top_k": 10**6},
    "all, float32": {"top_k": 10**6, "log_probs_dtype": "float32"},
    **{f"{count} samples": {"num_samples": count} for count in (12, 50, 200)},
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--student", help="a checkpoint; by default a new student")
    parser.add_argument("--teacher", default=TEACHER)
    parser.add_argument("--data", nargs=2, default=("embedded:easy-vqa", "mixture"), metavar=("NAME", "CONFIG"))
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3, help="of reading, for the JSON")
    add_json(parser)
    options = parser.parse_args()
    disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        result, times = measure(options, Path(folder))
    print(json.dumps(result, indent=1))
    write_json(options.json, __file__, json_rows(result, times) if times else [], threads=torch.get_num_threads())


def json_rows(result, times):
    """Bytes a response token of each way beside the whole distribution, and seconds of reading them."""
    sizes, tokens = {name: result[name]["bytes_per_token"] for name in WAYS}, result["response_tokens"]
    rows = [measured(f"{name}: size", size, "bytes", {"all": sizes["all"]}) for name, size in sizes.items()]
    for name in WAYS:
        rows.append(measured(f"{name}: error of the sum", result[name]["gradient_error_of_the_sum"], "of the gradient"))
        bases = {"floor": times[f"{name}: files"], "live": times["live"]}
        bases = {base: [each / tokens for each in values] for base, values in bases.items()}
        read = [each / tokens for each in times[name]]
        rows.append(measured(f"{name}: read", read, "processor s per response token", bases))
    return rows


def read_times(caches, batches, teacher, rounds):
    """`{name: [processor seconds]}` for all batches: of each cache, of its files alone, and of the teacher itself."""

    def live():
        for _, batch, labels in batches:
            teacher(**batch, logits_to_keep=shift_for_next_token(labels)[0])

    def read(cache):
        for examples, _, labels in batches:
            cache.rows({}, cache.collate(examples, {"labels": labels}), labels)

    def files(cache):
        for path in Path(cache.folder).glob("*.parquet"):
            pq.read_table(path, use_threads=False)

    steps = {"live": live}
    for name, cache in caches.items():
        steps |= {name: partial(read, cache), f"{name}: files": partial(files, cache)}
    return in_turns(steps, rounds, clock="cpu")


@torch.no_grad()
def measure(options, folder):
    if options.student is None:
        options.student = str(folder / "student")
        save_checkpoint(*build_student(options.teacher, "embedded:tiny-student-lm"), options.student)
    name, config = options.data
    data = DataArguments(dataset_name=name, dataset_config=config, max_samples=options.rows)
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
    for name, command in WAYS.items():
        distill = DistillArguments(student=options.student, teacher=options.teacher, teacher_cache=str(folder / name))
        run_cache_teacher(data, distill, UpcycleArguments(), args, CacheCommand(**command))
        caches[name] = CachedTeacher(str(folder / name))

    student, processor = load_model_and_processor(options.student)
    teacher, _ = load_model_and_processor(options.teacher)
    rows = load_rows(data, columns=("prompt", "completion"), seed=args.seed)
    collator = response_collator(processor, args, rows.column_names)
    tokens, full_sum, gradient, batches = 0, 0.0, 0.0, []
    sums = {name: {"kl": 0.0, "rest": 0.0, "errors": 0.0, "gradient": 0.0, "seconds": 0.0} for name in caches}
    for examples in DataLoader(rows, batch_size=64, collate_fn=list):
        batch = collator([dict(example) for example in examples])
        labels = batch.pop("labels")
        batches.append((examples, batch, labels))
        keep, _ = shift_for_next_token(labels)
        logits = student(**batch, logits_to_keep=keep).logits
        theirs = teacher(**batch, logits_to_keep=keep).logits
        full, exact = with_gradient(divergence_rows, logits, theirs, temperature=options.temperature)
        tokens, full_sum, gradient = tokens + len(full), full_sum + full.sum().item(), gradient + exact.sum(0)
        for name, cache in caches.items():
            start = time.process_time()
            own = cache.collate(examples, {"labels": labels})
            sums[name]["seconds"] += time.process_time() - start
            answer = cache.rows({}, own, labels)
            values = (answer.index, answer.log_probs)
            found, theirs = with_gradient(top_k_forward_kl, logits, *values, temperature=options.temperature)
            sums[name]["kl"] += (found - full).sum().item()
            sums[name]["rest"] += (1 - answer.log_probs.exp().sum(-1)).clamp(min=0).sum().item()
            sums[name]["errors"] += ((theirs - exact).norm(dim=-1) / exact.norm(dim=-1)).sum().item()
            sums[name]["gradient"] = sums[name]["gradient"] + theirs.sum(0)
    result = {
        "rows": len(rows),
        "response_tokens": tokens,
        "full_kl": full_sum / tokens,
        "vocabulary": logits.shape[-1],
    }
    for name, found in sums.items():
        size = sum(path.stat().st_size for path in Path(caches[name].folder).glob("*.parquet"))
        result[name] = {
            "bytes_per_token": round(size / tokens, 1),
            "kl_difference": found["kl"] / tokens,
            "mass_beyond": found["rest"] / tokens,
            "gradient_error_of_a_token": found["errors"] / tokens,
            "gradient_error_of_the_sum": ((found["gradient"] - gradient).norm() / gradient.norm()).item(),
            "read_tokens_per_second": round(tokens / found["seconds"]),
        }
    return result, read_times(caches, batches, teacher, options.rounds) if options.json else None


def with_gradient(divergence, logits, *values, **options):
    """Rows of a divergence, and the gradient of each by the student's logits."""
    with torch.enable_grad():
        logits = logits.detach().requires_grad_()
        rows = divergence(logits, *values, **options)
        return rows.detach(), torch.autograd.grad(rows.sum(), logits)[0]


if __name__ == "__main__":
    main()
