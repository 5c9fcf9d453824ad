"""DocVQA's measure: answers that are nearly spelt as a reference."""

from llava_mod_hf.evaluation.metrics.ratios import RatioMetric

THRESHOLD = 0.5


class Anls(RatioMetric):
    """
    Average normalised Levenshtein similarity (Biten et al., 2019, arXiv 1905.13648), as DocVQA has it.

        s = max over references of 1 − edits(answer, reference) / longer of the two,   0 where that is below 0.5

    Capitals and repeated spaces do not count. At exactly 0.5 the published scorer keeps the similarity, which the paper
    would set to 0.

    `compute(predictions=…, references=…)` takes texts, and a list of texts for each; it returns `anls`.
    """

    description = "Average normalised Levenshtein similarity, 0 below one half."
    lists = ("references",)

    def count(self, prediction, references):
        best = max(map(_similarity, [prediction] * len(references), references), default=0.0)
        return {"anls": (best if best >= THRESHOLD else 0.0, 1)}


def _similarity(prediction, reference):
    first, second = (" ".join(text.lower().split()) for text in (prediction, reference))
    return 1 - edits(first, second) / max(len(first), len(second), 1)


def edits(first, second):
    """Levenshtein's distance: how many characters are put in, taken out or replaced to make one text of the other."""
    above = list(range(len(second) + 1))
    for row, character in enumerate(first, 1):
        line = [row]
        for column, other in enumerate(second, 1):
            line.append(min(above[column] + 1, line[-1] + 1, above[column - 1] + (character != other)))
        above = line
    return above[-1]
