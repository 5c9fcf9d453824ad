"""
Padding of a LLaVA-like mix: rows in random order, grouped by length, and batches of as many tokens.

    python benchmarks/padding.py [--conversations 2000] [--batch 16] [--processes 1] [--json FILE]

The mix is that of `benchmarks/multi_turn.py`, a conversation in one pass. Batches of tokens may have as many as the
largest batch of `--batch` rows, padded, so that a step takes as much memory. Nothing is trained.
"""

import argparse

import numpy as np
from measuring import add_json, measured, write_json
from multi_turn import make_processor, make_rows

from llava_mod_hf.data.fitting import LENGTH, NUM_IMAGES, fit_rows
from llava_mod_hf.data.grouping import ModalityLengthSampler, TokenBatches


def batches_of(order, size):
    return [order[start : start + size] for start in range(0, len(order), size)]


def measure(conversations, size, processes, seed=0):
    """`{way: (padding's share, fewest rows, most rows, tokens of the largest batch, batches of a process)}`."""
    rows, _ = fit_rows(
        make_rows(conversations, np.random.default_rng(seed)), make_processor(), max_length=None, multi_turn="whole"
    )
    lengths, has_images = rows[LENGTH][:], [count > 0 for count in rows[NUM_IMAGES][:]]
    options = {"seed": seed, "epoch": lambda: 0}
    grouped = ModalityLengthSampler(lengths, has_images, unit=size * processes, **options)
    ways = {
        "random": batches_of(np.random.default_rng(seed).permutation(len(lengths)).tolist(), size),
        "group_by_length": batches_of(list(grouped), size),
    }

    def padded(batch):
        return len(batch) * max(lengths[row] for row in batch)

    budget = max(padded(batch) for batch in ways["group_by_length"])
    of_each = [
        TokenBatches(lengths, has_images, budget=budget, processes=processes, process=process, **options)
        for process in range(processes)
    ]
    ways[f"max_tokens_per_batch: {budget}"] = [batch for sampler in of_each for batch in sampler]
    found = {}
    for name, batches in ways.items():
        read = [padded(batch) for batch in batches]
        counts = [len(batch) for batch in batches]
        share = 1 - sum(lengths[row] for batch in batches for row in batch) / sum(read)
        found[name] = share, min(counts), max(counts), max(read), -(-len(batches) // processes)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--processes", type=int, default=1)
    add_json(parser)
    options = parser.parse_args()
    found = measure(options.conversations, options.batch, options.processes)
    print("| | padding | rows of a batch | tokens of the largest | batches |")
    print("|---|---:|---:|---:|---:|")
    for name, (share, fewest, most, largest, batches) in found.items():
        print(f"| `{name}` | {share:.1%} | {fewest}–{most} | {largest:,} | {batches} |")
    read = {name.partition(":")[0]: 1 / (1 - share) for name, (share, *_) in found.items()}
    rows = [
        measured(
            name, each, "tokens read per token of a row",
            {"floor": 1.0, **{base: read[base] for base in ("random", "group_by_length") if base != name}},
        )
        for name, each in read.items()
    ]  # fmt: skip
    write_json(options.json, __file__, rows)


if __name__ == "__main__":
    main()
