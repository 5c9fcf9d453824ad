"""
The embedded data and weights that the quickstart, the tests and `recipes/tiny/` run on.

The data is easy-VQA (https://github.com/vzhou842/easy-VQA, MIT): 4,000 + 1,000 drawn images of one shape each, 64×64
pixels, with 38,575 + 9,673 questions and fixed splits. A published VQA set of drawn shapes, not photographs.
"""

import functools
import random
import re
from collections import Counter, defaultdict

import easy_vqa
from datasets import Dataset, Features, Image, List, Value

DATASET = "embedded:easy-vqa"

SHAPES = ("circle", "rectangle", "triangle")

COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")

CAPTION_PROMPT = "describe the image."

_MESSAGES = [{"role": Value("string"), "content": Value("string")}]


def question_kind(question):
    """Kind of an easy-VQA question: `"color"`, `"shape"` or `"yes/no"`."""
    if not question.startswith("what"):
        return "yes/no"
    return "color" if "color" in question else "shape"


def presence(question, answer):
    """
    Whether an answer to a yes/no question claims that the thing asked for is there, whatever the question's polarity.

    Returns:
        `bool` or `None`: `None` if the answer is neither yes nor no.
    """
    if answer not in ("yes", "no"):
        return None
    negated = bool(re.search(r"\b(not|no)\b", question))
    return (answer == "yes") != negated


@functools.cache
def questions(split):
    """
    The questions of a split as they are published.

    Args:
        split (`"train"` or `"test"`).

    Returns:
        `list[dict]`: `image_id`, `question`, `answer`, `kind`.
    """
    texts, answers, image_ids = {"train": easy_vqa.get_train_questions, "test": easy_vqa.get_test_questions}[split]()
    return [
        {"image_id": image_id, "question": text, "answer": answer, "kind": question_kind(text)}
        for text, answer, image_id in zip(texts, answers, image_ids, strict=True)
    ]


@functools.cache
def image_paths(split):
    """Path of each image of a split, by image id."""
    return {"train": easy_vqa.get_train_image_paths, "test": easy_vqa.get_test_image_paths}[split]()


@functools.cache
def image_labels(split):
    """`{image id: (color, shape)}`, read off the questions and answers, for the images where both follow from them."""
    colors, shapes = {}, {}
    for row in questions(split):
        image_id, answer = row["image_id"], row["answer"]
        if row["kind"] == "color":
            colors[image_id] = answer
        elif row["kind"] == "shape":
            shapes[image_id] = answer
        if row["kind"] != "yes/no" or presence(row["question"], answer):
            for word in row["question"].rstrip("?").split():
                if word in COLORS:
                    colors[image_id] = word
                elif word in SHAPES:
                    shapes[image_id] = word
    return {i: (colors[i], shapes[i]) for i in sorted(colors.keys() & shapes.keys())}


def caption(color, shape):
    return f"a {color} {shape}"


def balanced(rows, seed):
    """
    Rows of which, for each question text, every answer that occurs is as frequent as every other.

    A model that does not look at the image cannot tell them apart. The more frequent answers are thinned out at random.
    """
    by_text = defaultdict(lambda: defaultdict(list))
    for row in rows:
        by_text[row["question"]][row["answer"]].append(row)
    rng = random.Random(seed)
    kept = []
    for _, by_answer in sorted(by_text.items()):
        count = min(len(group) for group in by_answer.values())
        kept += [row for _, group in sorted(by_answer.items()) for row in rng.sample(group, count)]
    rng.shuffle(kept)
    return kept


def caption_rows(split):
    return [
        {"image_id": i, "question": CAPTION_PROMPT, "answer": caption(color, shape), "kind": "caption"}
        for i, (color, shape) in image_labels(split).items()
    ]


def most_frequent_answers(rows):
    """`{question text: most frequent answer}`: the blind baseline."""
    counts = defaultdict(Counter)
    for row in rows:
        counts[row["question"]][row["answer"]] += 1
    # ties go to the alphabetically first, so that the baseline does not depend on the order of the rows
    return {text: min(answers, key=lambda a: (-answers[a], a)) for text, answers in counts.items()}


def _mixture(split, seed):
    """Balanced questions with 20 % captions."""
    rng = random.Random(seed)
    asked = balanced(questions(split), seed)
    rows = asked + rng.choices(caption_rows(split), k=len(asked) // 4)
    rng.shuffle(rows)
    return rows


def _shuffled(rows, seed):
    random.Random(seed).shuffle(rows)
    return rows


ROWS = {
    "captions": lambda split, seed: _shuffled(caption_rows(split), seed),
    "questions": lambda split, seed: balanced(questions(split), seed),
    "mixture": _mixture,
}


def _wrong(row, rng):
    """An answer of the same kind that is wrong: for a caption, one that names something that is not there."""
    if row["kind"] == "yes/no":
        return "no" if row["answer"] == "yes" else "yes"
    if row["kind"] != "caption":
        return rng.choice([word for word in (COLORS if row["kind"] == "color" else SHAPES) if word != row["answer"]])
    _, color, shape = row["answer"].split()
    wrong_color = rng.choice([word for word in COLORS if word != color])
    wrong_shape = rng.choice([word for word in SHAPES if word != shape])
    return rng.choice([caption(wrong_color, shape), caption(color, wrong_shape), caption(wrong_color, wrong_shape)])


def load(config, split, seed=0):
    """
    Embedded rows in TRL's formats.

    Args:
        config (`str`):
            `"captions"`, `"questions"` (balanced by answer per question text), `"mixture"` (questions with 20 %
            captions) or `"preferences"` (a right and a wrong answer to each row of the mixture).
        split (`"train"` or `"test"`).
        seed (`int`):
            Which of the more frequent answers are left out, which wrong answer is taken, and the order.

    Returns:
        `datasets.Dataset`: `images`, `prompt`, `completion` (or `chosen`, `rejected`), `question`, `answer`, `kind`.

    Raises:
        ValueError: if there is no such `config` or `split`.
    """
    if config not in (*ROWS, "preferences") or split not in ("train", "test"):
        raise ValueError(
            f"easy-VQA has no `{config}` of split `{split}`: take one of {', '.join([*ROWS, 'preferences'])}, and "
            "`train` or `test`."
        )
    rows = ROWS["mixture" if config == "preferences" else config](split, seed)
    paths = image_paths(split)
    columns = {
        "images": [[paths[row["image_id"]]] for row in rows],
        "prompt": [[{"role": "user", "content": row["question"]}] for row in rows],
        **{name: [row[name] for row in rows] for name in ("question", "answer", "kind")},
    }
    answers = [[{"role": "assistant", "content": row["answer"]}] for row in rows]
    if config == "preferences":
        rng = random.Random(seed)
        columns["chosen"] = answers
        columns["rejected"] = [[{"role": "assistant", "content": _wrong(row, rng)}] for row in rows]
    else:
        columns["completion"] = answers
    types = {"images": List(Image()), "question": Value("string"), "answer": Value("string"), "kind": Value("string")}
    return Dataset.from_dict(columns, features=Features({name: types.get(name, _MESSAGES) for name in columns}))


def load_text(split, seed=0):
    """
    All questions, as unbalanced as they are published, and captions, with the caption in place of the image.

    Unbalanced on purpose: that "is there no …?" is mostly answered yes and "is there a …?" no is how polarity is
    learnt; where every question text has both answers equally often, polarity alone tells nothing.

    Returns:
        `datasets.Dataset`: `prompt`, `completion`.
    """
    labels = image_labels(split)
    rows = [row for row in questions(split) + caption_rows(split) if row["image_id"] in labels]
    random.Random(seed).shuffle(rows)
    return Dataset.from_dict(
        {
            "prompt": [
                [
                    {"role": "system", "content": caption(*labels[row["image_id"]])},
                    {"role": "user", "content": row["question"]},
                ]
                for row in rows
            ],
            "completion": [[{"role": "assistant", "content": row["answer"]}] for row in rows],
        }
    )
