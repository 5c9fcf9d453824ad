"""
Pictures a second that one worker of a data loader makes ready: read, checked, scaled, batched; beside the least work.

    python benchmarks/data_loading.py [--pictures 64] [--size 640 480] [--repeats 3] [--json FILE]

JPEG files in a folder beside a JSON of LLaVA's format, a picture each, batches of 8 for an encoder of 336 pixels. The
floor reads a file and runs the image processor; `trl` is TRL's collator over a `Dataset` of the files, which checks no
row. Time is of the processor, not of the clock: other work beside it does not count. With it, how often a picture was
decoded. A worker is a process; a data loader has as many as `dataloader_num_workers`, and what they hand on are
batches, not pictures.
"""

import argparse
import json
import statistics
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, List
from datasets import Image as ImageFeature
from measuring import add_json, in_turns, rows_of, write_json
from multi_turn import MESSAGES, make_processor
from PIL import Image, ImageFile
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from llava_mod_hf.data.arguments import DataArguments
from llava_mod_hf.data.conversations import AnswersCollator
from llava_mod_hf.data.fitting import fit_rows
from llava_mod_hf.data.load import load_rows

BATCH = 8


def write_rows(folder, count, size):
    """JPEG files with something in them, and `rows.json`."""
    generator, rows = np.random.default_rng(0), []
    turns = [{"from": "human", "value": "<image>\nis a red square there?"}, {"from": "gpt", "value": "a red square"}]
    for i in range(count):
        coarse = generator.integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(folder / f"{i}.jpg", quality=90)
        rows.append({"id": i, "image": f"{i}.jpg", "conversations": turns})
    (folder / "rows.json").write_text(json.dumps(rows))


def trl_rows(folder, count):
    """The same rows as a `Dataset` of TRL's, whose pictures are decoded as they are read."""
    question = [{"role": "user", "content": "is a red square there?"}]
    answer = [{"role": "assistant", "content": "a red square"}]
    rows = [{"images": [str(folder / f"{i}.jpg")], "prompt": question, "completion": answer} for i in range(count)]
    features = {"images": List(ImageFeature()), "prompt": MESSAGES, "completion": MESSAGES}
    return Dataset.from_list(rows, features=Features(features))


class Decodes:
    """Counts the pictures that Pillow decodes."""

    def __enter__(self):
        self.count, self._load = 0, ImageFile.ImageFile.load

        def load(image):
            self.count += bool(getattr(image, "tile", None))
            return self._load(image)

        ImageFile.ImageFile.load = load
        return self

    def __exit__(self, *error):
        ImageFile.ImageFile.load = self._load


def in_batches(rows, collate):
    batch = []
    for row in rows:
        batch.append(row)
        if len(batch) == BATCH:
            collate(batch)
            batch = []


def measure(pictures, size, repeats):
    """
    Returns:
        `(dict, dict)`: of each way, processor seconds a picture of each round, and decodings a picture.
    """
    processor = make_processor()
    collate = AnswersCollator(processor=processor, max_length=None, completion_only_loss=True)
    with tempfile.TemporaryDirectory() as name:
        folder, ways = Path(name), {}
        write_rows(folder, pictures, size)

        def floor():
            paths = (folder / f"{i}.jpg" for i in range(pictures))
            images = (Image.open(path).convert("RGB") for path in paths)
            in_batches(images, lambda batch: processor.image_processor(batch, return_tensors="pt"))

        ways["floor"] = floor
        for kind, streaming in (("rows", False), ("a stream", True)):
            args = DataArguments(str(folder / "rows.json"), image_folder=str(folder), streaming=streaming)
            rows, _ = fit_rows(load_rows(args, columns=("prompt", "completion")), processor, max_length=2048)
            ways[kind] = lambda rows=rows: in_batches(rows, collate)
        plain = DataCollatorForVisionLanguageModeling(processor=processor, max_length=None, completion_only_loss=True)
        files = trl_rows(folder, pictures)
        ways["trl"] = lambda: in_batches(files, plain)
        decodings = {}

        def counted(way):
            with Decodes() as decodes:
                ways[way]()
            decodings[way] = decodes.count / pictures

        times = in_turns({way: partial(counted, way) for way in ways}, repeats, clock="cpu")
    return {way: [each / pictures for each in values] for way, values in times.items()}, decodings


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--size", type=int, nargs=2, default=(640, 480), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--repeats", type=int, default=3)
    add_json(parser)
    options = parser.parse_args()
    times, decodings = measure(options.pictures // BATCH * BATCH, tuple(options.size), options.repeats)
    print("| | pictures/s of a worker | time / floor | decodings |")
    print("|---|---:|---:|---:|")
    medians = {way: statistics.median(values) for way, values in times.items()}
    for way, seconds in medians.items():
        print(f"| {way} | {1 / seconds:.0f} | {seconds / medians['floor']:.2f} | {decodings[way]:.0f} |")
    rows = rows_of(times, "processor s per picture", ("floor", "trl"))
    write_json(options.json, __file__, rows)


if __name__ == "__main__":
    main()
