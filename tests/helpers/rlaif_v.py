"""RLAIF-V's Parquet, with its columns and their types."""

from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature

STRINGS = ("ds_name", "question", "chosen", "rejected", "origin_dataset", "origin_split", "idx", "image_path")


def write_rlaif_v(path, rows):
    """
    Args:
        path (`Path`): of the file.
        rows (`Iterable[tuple]`): picture (`{"bytes", "path"}`), question, chosen and rejected answer of each.
    """
    pairs = [
        {
            "ds_name": "RLAIF-V",
            "image": image,
            "question": question,
            "chosen": chosen,
            "rejected": rejected,
            "origin_dataset": "OK-VQA",
            "origin_split": "{}",
            "idx": str(number),
            "image_path": f"RLAIF-V-Dataset/{number}.jpg",
        }
        for number, (image, question, chosen, rejected) in enumerate(rows)
    ]
    features = Features({**{name: Value("string") for name in STRINGS}, "image": ImageFeature()})
    Dataset.from_list(pairs, features=features).to_parquet(path)
