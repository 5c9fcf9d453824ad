"""
Tokens that a student reads for each supervised token of a LLaVA-like mix: a conversation in one pass, a row for each
answer, and the authors' one pass.

    python benchmarks/multi_turn.py [--conversations 2000] [--seed 0] [--json FILE]

The mix: 1 to 20 answers a conversation, five on average (a cut geometric distribution), questions of 12 tokens,
answers of 40 with their end; 576 tokens of a picture, one conversation in ten without. Nothing is trained: the lengths
are those that `fit_rows` finds, which its tests hold to the collator's.
"""

import argparse

import numpy as np
import torch
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from measuring import add_json, measured, write_json
from PIL import Image
from transformers import LlavaProcessor

from llava_mod_hf.commands.pretrain import image_processor, train_tokenizer
from llava_mod_hf.data.conversations import AnswersCollator
from llava_mod_hf.data.fitting import LENGTH, NUM_IMAGES, fit_rows
from llava_mod_hf.data.grouping import ModalityLengthSampler

MOST, MEAN, QUESTION, ANSWER = 20, 5, 12, 40

IMAGE_SIZE, PATCH_SIZE = 336, 14  # 24 · 24 = 576 tokens

WITHOUT_PICTURE = 0.1

MESSAGES = [{"role": Value("string"), "content": Value("string")}]

BATCH = 16


def make_processor():
    """The embedded tokenizer and template, with pictures of 576 tokens."""
    tokenizer = train_tokenizer(384)
    return LlavaProcessor(
        image_processor=image_processor(IMAGE_SIZE),
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=tokenizer.chat_template,
        image_token="<image>",
    )


def numbers_of_answers(count, generator):
    """Draws of 1 to `MOST`, with probabilities ∝ qⁿ whose mean is `MEAN`."""
    n = np.arange(1, MOST + 1)
    low, high = 0.0, 1.0
    for _ in range(60):
        q = (low + high) / 2
        low, high = (q, high) if (n * q**n).sum() / (q**n).sum() < MEAN else (low, q)
    return generator.choice(n, size=count, p=q**n / (q**n).sum())


def make_rows(count, generator):
    """`count` conversations as `load_rows` gives them with `multi_turn: whole`."""
    image, rows = Image.new("RGB", (8, 8)), []
    for answers in numbers_of_answers(count, generator):
        turns = [{"role": "user", "content": "is" + " a" * (QUESTION - 1)}]
        turns += [{"role": "assistant", "content": "red" + " a" * (ANSWER - 2)}]
        messages = turns * int(answers)
        images = [] if generator.random() < WITHOUT_PICTURE else [image]
        rows.append({"images": images, "prompt": messages[:1], "completion": messages[1:]})
    features = {"images": List(ImageFeature()), "prompt": MESSAGES, "completion": MESSAGES}
    return Dataset.from_list(rows, features=Features(features))


def padded(rows):
    """Tokens with padding: batches of similar length and one modality, in a `group_by_length` epoch."""
    lengths = np.array(rows[LENGTH][:])
    sampler = ModalityLengthSampler(
        lengths.tolist(), [count > 0 for count in rows[NUM_IMAGES][:]], unit=BATCH, seed=0, epoch=lambda: 0
    )
    order = list(sampler)
    batches = [lengths[order[start : start + BATCH]] for start in range(0, len(order), BATCH)]
    return sum(int(batch.max()) * len(batch) for batch in batches)


def authors_tokens(rows, processor):
    """One pass over each conversation, its text tokenised at once, a picture's placeholder replaced."""
    total = 0
    for row in rows.select_columns(["prompt", "completion"]):
        text = processor.tokenizer.apply_chat_template([*row["prompt"], *row["completion"]], tokenize=False)
        total += len(processor.tokenizer(text, add_special_tokens=False)["input_ids"])
    return total + sum(rows[NUM_IMAGES][:]) * (IMAGE_SIZE // PATCH_SIZE) ** 2


def measure(conversations, seed):
    """
    Returns:
        `dict`: `answers` and `supervised` tokens of the mix, and of each way the tokens read for a supervised one,
        alone and with the padding of batches.
    """
    processor, rows = make_processor(), make_rows(conversations, np.random.default_rng(seed))
    supervised = ANSWER * sum(len(row["completion"]) // 2 + 1 for row in rows.select_columns("completion"))
    found = {}
    for way in ("whole", "expand"):
        fitted, _ = fit_rows(rows, processor, max_length=None, multi_turn=way)
        found[way] = sum(fitted[LENGTH][:]) / supervised, padded(fitted) / supervised
        if way == "whole":
            found["authors"] = authors_tokens(fitted, processor) / supervised, None
            first = fitted.select(range(4))
            batch = AnswersCollator(processor, completion_only_loss=True)([*first.select_columns(rows.column_names)])
            assert torch.equal(batch["attention_mask"].sum(1), torch.tensor(first[LENGTH][:]))
            answers = [len(row["completion"]) // 2 + 1 for row in first]
            assert ((batch["labels"] != -100).sum(1) == ANSWER * torch.tensor(answers)).all()
    return {"answers": supervised // ANSWER, "supervised": supervised, **found}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    add_json(parser)
    options = parser.parse_args()
    found = measure(options.conversations, options.seed)
    print(f"{options.conversations} conversations, {found['answers']} answers, {found['supervised']} supervised tokens")
    print("| | tokens read per supervised token | with padding | × the authors' |")
    print("|---|---:|---:|---:|")
    for way in ("whole", "expand", "authors"):
        alone, with_padding = found[way]
        extra = "" if with_padding is None else f"{with_padding:.2f}"
        print(f"| {way} | {alone:.2f} | {extra} | {alone / found['authors'][0]:.2f} |")
    unit, bases = "tokens read per supervised token", {"authors": found["authors"][0]}
    ways = ("whole", "expand", "authors")
    rows = [measured(way, found[way][0], unit, {} if way == "authors" else bases) for way in ways]
    rows += [
        measured(f"{way}: with padding", found[way][1], unit, {"without padding": found[way][0]}) for way in ways[:2]
    ]
    write_json(options.json, __file__, rows)


if __name__ == "__main__":
    main()
