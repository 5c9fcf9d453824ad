"""POPE: yes or no to questions of presence."""

from llava_mod_hf.evaluation.metrics.ratios import RatioMetric, figures_of, normalize_answer

PRESENCE = "presence ("  # what the kinds of POPE's rows start with

SORTS = ("random", "popular", "adversarial")


def count_answer(said, right):
    """What an answer adds to POPE's figures, "yes" being the positive class."""
    hit, claims, present = said == right == "yes", said == "yes", right == "yes"
    return {
        "accuracy": (said == right, 1),
        "precision": (hit, claims),
        "recall": (hit, present),
        "f1": (2 * hit, claims + present),
        "yes": (claims, 1),
    }


class Pope(RatioMetric):
    """
    Answers to questions of presence, after POPE (Li et al., 2023, arXiv 2305.10355), with "yes" as the positive class.

    Rows are those of a kind `presence (…)`: of absent things drawn at random, of popular ones and of those that usually
    come with what is there. An answer that is neither yes nor no counts as wrong, and as no claim.

    `compute(predictions=…, references=…, kinds=…)` takes lists of strings and returns `pope`, a `dict` by kind of
    `accuracy`, `precision`, `recall`, `f1` and `yes` (share of yes). Without a "yes" `precision` and `f1` are `None`,
    and `recall` where nothing that is asked for is there.
    """

    description = "Accuracy, precision, recall, F1, share of yes."
    inputs = ("predictions", "references", "kinds")

    def read(self, answer):
        """`yes`, `no`, or something that is neither."""
        return normalize_answer(answer)

    def count(self, prediction, reference, kind):
        return count_answer(self.read(prediction), normalize_answer(reference)) if kind.startswith(PRESENCE) else {}

    def _compute(self, predictions, references, kinds):
        by_kind = {}
        for row in zip(predictions, references, kinds, strict=True):
            if counted := self.count(*row):
                by_kind.setdefault(row[2], []).append(counted)
        return {"pope": {kind: _sure(figures_of(units)) for kind, units in sorted(by_kind.items())}}


def _sure(figures):
    """Without a claim F1 is not known, though its sum is."""
    return figures | {"f1": None} if figures["precision"] is None else figures


class PopeBenchmark(Pope):
    """
    The same of POPE's published rows and answers in sentences: the figures over all rows, and by kind.

    An answer is read as the published scorer reads it: no, if its first sentence has the word "no" or "not", else yes.
    Kinds are `random`, `popular` and `adversarial`, alone or as the scenes have them, `presence (random)`; rows of
    another kind are left out, but those of no kind, which count in the figures over all.

    `compute(predictions=…, references=…, kinds=…)` returns `accuracy`, …, and `random/accuracy`, ….
    """

    def read(self, answer):
        words = answer.split(".")[0].replace(",", "").split()
        return "no" if {"no", "No", "not"} & set(words) else "yes"

    def count(self, prediction, reference, kind):
        sort = kind.strip().lower().removeprefix(PRESENCE).removesuffix(")")
        if sort and sort not in SORTS:
            return {}
        right = normalize_answer(reference)
        if right not in ("yes", "no"):
            raise ValueError(f"POPE's answers are yes or no, and a reference is {reference!r:.80}: mend the row.")
        counted = count_answer(self.read(prediction), right)
        return counted | ({f"{sort}/{figure}": pair for figure, pair in counted.items()} if sort else {})

    def _compute(self, **columns):
        return RatioMetric._compute(self, **columns)
