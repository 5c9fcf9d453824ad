"""
Peak memory of a process that streams generated rows through loader and collator, for several numbers of rows.

    python benchmarks/streaming_memory.py [--rows 10000 100000 1000000] [--json FILE]

Rows of `embedded:scenes`, each drawn when it is read, by its number; no model. Each number has a fresh process, whose
peak is the operating system's count of resident memory. A million rows take minutes, a quarter of an hour of one core.
In the JSON, the floor is the peak before the first row, and `whole` that of a process which loads the rows without
streaming, for the first number of them.
"""

import argparse
import multiprocessing
import resource
import time

from measuring import add_json, measured, write_json

BATCH = 32


def peak(count, streaming=True):
    """MiB before the first row and after `count`, and the seconds of the processor for them."""
    from llava_mod_hf import load_model_and_processor
    from llava_mod_hf.data.arguments import DataArguments
    from llava_mod_hf.data.conversations import AnswersCollator
    from llava_mod_hf.data.fitting import fit_rows
    from llava_mod_hf.data.load import load_rows

    _, processor = load_model_and_processor("embedded:scenes-teacher")
    collate = AnswersCollator(processor=processor, max_length=None, completion_only_loss=True)
    args = DataArguments(
        "embedded:scenes", dataset_config="mixture", dataset_options={"rows": count}, streaming=streaming
    )
    rows, _ = fit_rows(load_rows(args, columns=("prompt", "completion")), processor, max_length=512)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, time.process_time()
    seen, batch = 0, []
    for row in rows:
        batch.append(row)
        if len(batch) == BATCH:
            seen += len(collate(batch)["input_ids"])
            batch = []
    assert seen == count // BATCH * BATCH, seen
    return before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, time.process_time() - start


def in_fresh_process(*args):
    with multiprocessing.get_context("spawn").Pool(1) as fresh:
        return fresh.apply(peak, args)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    add_json(parser)
    options = parser.parse_args()
    print("| rows | peak MiB | / the first | processor seconds |", "|---:|---:|---:|---:|", sep="\n", flush=True)
    first, rows, whole = None, [], {}
    if options.json:
        _, whole["whole"], _ = in_fresh_process(options.rows[0], False)
    for count in options.rows:
        before, found, seconds = in_fresh_process(count)
        first = first or found
        print(f"| {count:,} | {found:.0f} | {found / first:.3f} | {seconds:.0f} |", flush=True)
        bases = {"floor": before, "the first": first, **(whole if count == options.rows[0] else {})}
        rows.append(measured(f"{count} rows: peak memory", found, "MiB", bases))
        rows.append(measured(f"{count} rows", seconds, "processor s"))
    write_json(options.json, __file__, rows)


if __name__ == "__main__":
    main()
