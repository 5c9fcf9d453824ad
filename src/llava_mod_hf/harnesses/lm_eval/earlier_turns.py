"""A conversation's earlier turns as lm-eval's few-shot examples, which it writes as turns of their own."""

import json

from lm_eval.api.samplers import ContextSampler


class EarlierTurns(ContextSampler):
    """Gives each row its own earlier turns, however many, in place of examples of other rows."""

    def sample(self, n, eval_doc=None, df=None, **kwargs):
        return json.loads(eval_doc["earlier"])


def no_examples(rows):
    """The rows that examples are drawn from, of which none is read."""
    return rows.select([])
