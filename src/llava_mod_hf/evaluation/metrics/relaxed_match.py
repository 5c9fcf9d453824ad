"""ChartQA's measure: numbers within five per cent."""

import math

from llava_mod_hf.evaluation.metrics.ratios import RatioMetric

TOLERANCE = 0.05


class RelaxedMatch(RatioMetric):
    """
    Share of answers that are within 5 % of a reference, after ChartQA (Masry et al., 2022, arXiv 2203.10244, 5.1).

        |answer − reference| ≤ 0.05 · |reference|

    where both are numbers and the reference is not 0, a per cent sign meaning hundredths; else they have to be equal
    but for capitals and outer spaces, as in the scorer published with Pix2Struct. Unlike in exact match a trailing
    period counts: "14." is a number, "yes." is not "yes".

    `compute(predictions=…, references=…)` takes texts, and a list of texts for each; it returns `relaxed_match`.
    """

    description = "Share of answers equal to a reference, or within 5 % of it where both are numbers."
    lists = ("references",)

    def count(self, prediction, references):
        return {"relaxed_match": (any(_close(prediction, reference) for reference in references), 1)}


def _close(prediction, reference):
    said, right = _number(prediction), _number(reference)
    if said is not None and right:
        return abs(said - right) / abs(right) <= TOLERANCE
    return prediction.strip().lower() == reference.strip().lower()


def _number(text):
    """A finite number, or `None`."""
    text = text.strip()
    try:
        number = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
