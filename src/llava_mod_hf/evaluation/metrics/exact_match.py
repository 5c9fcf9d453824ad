"""Answers that equal a reference."""

from llava_mod_hf.evaluation.metrics.ratios import RatioMetric, normalize_answer


class ExactMatch(RatioMetric):
    """
    Share of answers that equal one of their references; outer spaces, capitals and one trailing period do not count.

    `compute(predictions=…, references=…)` takes texts, and a list of texts for each; it returns `exact_match`.
    """

    description = "Exact match of normalised answers with any of their references."
    lists = ("references",)

    def count(self, prediction, references):
        return {"exact_match": (normalize_answer(prediction) in map(normalize_answer, references), 1)}
