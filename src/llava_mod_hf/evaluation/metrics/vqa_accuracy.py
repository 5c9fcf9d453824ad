"""VQAv2's measure: as many annotators as agree with the answer."""

import re

from llava_mod_hf.evaluation.metrics.ratios import RatioMetric

NUMBERS = {"none": "0"} | {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
}

ARTICLES = ("a", "an", "the")

MARKS = ';/[]"{}()=+\\_-><@`,?!'

# what the published normaliser knows when an apostrophe is left out; of two apostrophes, either one
CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""

APOSTROPHES = {
    word[: mark.start()] + word[mark.end() :]: word for word in CONTRACTED.split() for mark in re.finditer("'", word)
} | {"somebody'd": "somebodyd"}  # so published


def normalize_vqa(text):
    """
    An answer as VQAv2's published evaluation compares it: without punctuation, articles and capitals, number words as
    digits, apostrophes of contractions in place.
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    thousands = re.search(r"\d,\d", text)
    found = text
    for mark in MARKS:
        beside_space = f"{mark} " in text or f" {mark}" in text
        found = found.replace(mark, "" if beside_space or thousands else " ")
    found = re.sub(r"\.(?!\d)", "", found)
    words = (NUMBERS.get(word, word) for word in found.lower().split())
    return " ".join(APOSTROPHES.get(word, word) for word in words if word not in ARTICLES)


class VqaAccuracy(RatioMetric):
    """
    VQA accuracy (Antol et al., 2015, arXiv 1505.00468): how many of the other annotators gave the same answer.

        accuracy = mean over the annotators left out of min(agreeing others / 3, 1)

    which for ten annotators is the average over all sets of nine. Answers are compared as [`normalize_vqa`] has them.
    Where all annotators agree the published script compares texts as they are; here they are normalised there too, as
    those do who send normalised answers to the benchmark's server.

    `compute(predictions=…, references=…)` takes texts, and for each the list of its annotators' answers; it returns
    `vqa_accuracy`.

    Raises:
        ValueError: if there are fewer than four annotators, of whom no three others could agree.
    """

    description = "VQA accuracy against the answers of several annotators."
    lists = ("references",)

    def count(self, prediction, references):
        if len(references) < 4:
            raise ValueError(
                f"A question has {len(references)} annotators' answers, and VQA accuracy asks for three others that "
                "agree: give at least four `answers` to each, or measure by another name."
            )
        said, given = normalize_vqa(prediction), [normalize_vqa(answer) for answer in references]
        agreeing = given.count(said)
        shares = [min((agreeing - (answer == said)) / 3, 1) for answer in given]
        return {"vqa_accuracy": (sum(shares) / len(shares), 1)}
