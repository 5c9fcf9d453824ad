"""
Draws `answer.png`, a test picture of the embedded data, enlarged, and writes what a student and the teacher say of it.

    python docs/show_answer.py --model runs/quickstart/prefer [--number 0] [--output docs/answer.png]

The questions are those that the data set asks of this picture; the last column is its own answer.
"""

import argparse
import sys
from pathlib import Path

from PIL import Image

from llava_mod_hf import load_model_and_processor
from llava_mod_hf.data import easy_vqa
from llava_mod_hf.evaluation.answers import generate_answers

SIZE = 192


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a student")
    parser.add_argument("--teacher", default="embedded:tiny-teacher")
    parser.add_argument("--number", type=int, default=0, help="of the picture, among those of the test questions")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("answer.png"))
    args = parser.parse_args(argv)
    rows = easy_vqa.load("questions", "test")
    pictures = [image["bytes"] or image["path"] for (image,) in rows.with_format("arrow")[:]["images"].to_pylist()]
    wanted = list(dict.fromkeys(pictures))[args.number]
    rows = rows.select([number for number, picture in enumerate(pictures) if picture == wanted])
    (image,) = rows[0]["images"]
    image.resize((SIZE, SIZE), Image.Resampling.NEAREST).save(args.output)
    said = [generate_answers(*load_model_and_processor(name), rows) for name in (args.model, args.teacher)]
    lines = ["| question | student | teacher | right |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(line)} |" for line in zip(rows["question"], *said, rows["answer"], strict=True)]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
