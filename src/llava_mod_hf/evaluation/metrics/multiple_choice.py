"""Multiple choice, and whether the choice stays right when the options change places."""

import re

from llava_mod_hf.evaluation.metrics.ratios import RatioMetric

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

LETTER = re.compile(r"\b(?:[AI](?! (?!or\b|and\b|is\b)[a-z])|[B-HJ-Z])\b(?!')")


class MultipleChoice(RatioMetric):
    """
    Right choices, with the circular evaluation of MMBench (Liu et al., 2023, arXiv 2307.06281, 4.2).

    A question is asked once for each rotation of its options, and is right only if it is so in all of them; guessing
    then gives next to nothing.

        circular_accuracy = questions right in every rotation / questions
        plain_accuracy = questions right as they are written (their first row) / questions
        unread_choices = rows whose answer names no single option / rows

    What an answer chooses is told by [`read_choice`]; where the benchmark asks a language model about an answer that
    names no option, it is wrong here.

    `compute(predictions=…, references=…, options=…, groups=…)` takes answers, right letters, the options of each row as
    they stood, and which question the row is a rotation of.
    """

    description = "Right choices of an option, in all rotations and as written."
    inputs = ("predictions", "references", "options", "groups")
    lists = ("options",)

    def units(self, *, inputs):
        questions = {}
        for prediction, reference, options, group in zip(*(inputs[name] for name in self.inputs), strict=True):
            questions.setdefault(group, []).append((read_choice(prediction, options), reference))
        return [
            {
                "circular_accuracy": (all(choice == right for choice, right in rows), 1),
                "plain_accuracy": (rows[0][0] == rows[0][1], 1),
                "unread_choices": (sum(choice is None for choice, _ in rows), len(rows)),
            }
            for rows in questions.values()
        ]


def read_choice(answer, options):
    """
    The letter of the option that an answer chooses.

    It is the only letter of an option that stands alone in the answer, or else that of the only option whose text is in
    it; of options within each other, the longest. In "A dog" and "I see" there is no letter, but a word.

    Args:
        answer (`str`), options (`list[str]`): in order; the first is `A`.

    Returns:
        `str` or `None`: none if there is no such option, or several.
    """
    known = LETTERS[: len(options)]
    letters = {letter for letter in LETTER.findall(answer) if letter in known}
    if len(letters) == 1:
        return letters.pop()
    if letters:
        return None
    if len(answer.strip().rstrip(".)").lstrip("(")) == 1:  # a small letter alone
        letter = answer.strip().rstrip(".)").lstrip("(").upper()
        return letter if letter in known else None
    said = answer.lower()
    texts = [text.strip().lower() for text in options]
    found = [text for text in texts if text and re.search(rf"(?<!\w){re.escape(text)}(?!\w)", said)]
    found = {text for text in found if not any(text != other and text in other for other in found)}
    return known[texts.index(found.pop())] if len(found) == 1 else None
