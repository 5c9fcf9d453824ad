"""What the tests of `load` and their likes share."""

import json

from datasets import Dataset

from llava_mod_hf.data.arguments import DataArguments
from llava_mod_hf.data.load import load_rows

COLUMNS = ("prompt", "completion")


def row(*images, question="what color is it?", answer="red"):
    return {
        "images": list(images),
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": answer}],
    }


def write(path, rows):
    if path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(path, **values):
    return load_rows(DataArguments(str(path), **values), columns=COLUMNS)
