"""CHAIR: what descriptions name that is not there, by the kinds of the scenes or by a list of synonyms."""

from llava_mod_hf.data.scenes import named_kinds
from llava_mod_hf.evaluation.metrics.ratios import RatioMetric
from llava_mod_hf.evaluation.metrics.synonyms import Synonyms

DESCRIBE = "describe"  # kind of the scenes' descriptions


def count_things(named, there):
    """
    What a description adds to CHAIR's figures.

    Args:
        named (`list[str]`): the things that it names, as often as they count.
        there (`set[str]`): those that are there.
    """
    absent = sum(thing not in there for thing in named)
    return {
        "chair_s": (absent > 0, 1),
        "chair_i": (absent, len(named)),
        "object_recall": (len(there.intersection(named)), len(there)),
    }


class CaptionHallucination(RatioMetric):
    """
    What descriptions name that is not there, after CHAIR (Rohrbach et al., 2018, arXiv 1809.02156), and what they find.

    Things are the kinds of the scenes world, each counted once; a reference description names everything that is there.

        chair_s = descriptions with an absent thing / descriptions        chair_i = absent things / things named
        object_recall = present things named / things present

    A description that names nothing has no absent thing, which is why recall stands beside it.

    `compute(predictions=…, references=…, kinds=…)` takes lists of strings; rows of another kind than `describe` are
    left out. With `keep_in_memory=True` nothing is cached on disk.

    Raises:
        ValueError: if no row of that kind has a reference that names a thing.
    """

    description = "Absent things in descriptions, and recall."
    inputs = ("predictions", "references", "kinds")
    empty = 0.0

    def count(self, prediction, reference, kind):
        return count_things(named_kinds(prediction), set(named_kinds(reference))) if kind == DESCRIBE else {}

    def _compute(self, **columns):
        if not any(
            kind == DESCRIBE and named_kinds(reference)
            for reference, kind in zip(columns["references"], columns["kinds"], strict=True)
        ):
            raise ValueError(f"No reference of kind `{DESCRIBE}` names a thing: nothing to compare descriptions with.")
        return super()._compute(**columns)


class Chair(RatioMetric):
    """
    CHAIR of descriptions of photographs, by a list of synonyms: every mention counts, as in the published scorer.

    What is there is what the references name: the annotated objects' names, and reference descriptions if given.

        chair_s = descriptions with an absent thing / descriptions        chair_i = absent mentions / mentions
        object_recall = present things named / things present

    `compute(predictions=…, references=…, synonyms=None)` takes texts, for each the list of its references, and a
    [`Synonyms`]; without one things are the kinds of the scenes, and rows whose references name none are left out.
    """

    description = "Absent things among those that descriptions mention, and recall."
    lists = ("references",)

    def count(self, prediction, references, synonyms=None):
        synonyms = synonyms or Synonyms.of_scenes()
        there = {thing for text in references for _, thing in synonyms.mentions(text)}
        if not there and synonyms.scenes:  # a question that is no description
            return {}
        return self.count_mentions(synonyms.mentions(prediction), there)

    def count_mentions(self, mentions, there):
        """What the `(word, thing)`s of a description add, of which the things of the set `there` are there."""
        return count_things([thing for _, thing in mentions], there)


class ObjectHalBench(Chair):
    """
    Object hallucination of responses and of mentions, as Object HalBench has it (RLHF-V, Yu et al., 2023,
    arXiv 2312.00849).

        response_hallucination = responses with an absent thing / responses that name a thing
        mention_hallucination = absent words / words for things, each counted once in a response

    The benchmark lets a language model find the words; here the list of synonyms finds them, so that the figures
    compare models with each other and not with published ones.

    `compute` takes what [`Chair`]'s takes.
    """

    description = "Absent things by response and by mention."

    def count_mentions(self, mentions, there):
        words = dict.fromkeys(mentions)  # each once
        counted = count_things([thing for _, thing in words], there)
        return {
            "response_hallucination": (counted["chair_s"][0], bool(words)),
            "mention_hallucination": counted["chair_i"],
            "object_recall": counted["object_recall"],
        }
