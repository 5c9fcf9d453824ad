"""Metrics whose figures are ratios of sums over the rows, so that a bootstrap can draw the rows anew."""

import datasets
import evaluate


def normalize_answer(text):
    """An answer without surrounding space, capitals and a trailing period."""
    return text.strip().lower().removesuffix(".").rstrip()


def ratio(pairs, empty=None):
    """
    Args:
        pairs (`Iterable[tuple[float, float]]`): numerator and denominator of each row.
        empty (*optional*): what is returned where there is nothing to count.

    Returns:
        `float`: the sum of the numerators by that of the denominators.
    """
    above, below = (sum(side) for side in zip(*pairs, strict=True))
    return above / below if below else empty


def figures_of(units, empty=None):
    """`dict`: each figure of counted units, `{figure: (numerator, denominator)}` each; in order of their first one."""
    pairs = {}
    for unit in units:
        for figure, pair in unit.items():
            pairs.setdefault(figure, []).append(pair)
    return {figure: ratio(each, empty) for figure, each in pairs.items()}


class RatioMetric(evaluate.Metric):
    """
    A metric that says what each row adds to its figures.

    A subclass has `description`, `inputs` and `count`. Everything that `compute` takes beyond the inputs is handed on
    to `count`. With `keep_in_memory=True` nothing is cached on disk.
    """

    description = ""
    inputs: tuple = ("predictions", "references")
    lists: tuple = ()  # of the inputs, those that hold a list of texts for every row
    empty: float | None = None  # a figure's value where nothing counts

    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=self.description,
            citation="",
            features=datasets.Features(
                {name: datasets.List(text) if name in self.lists else text for name in self.inputs}
            ),
            inputs_description="One text for each question; lists of texts for " + (", ".join(self.lists) or "none."),
        )

    def count(self, *row, **options):
        """
        What a row adds to each figure.

        Args:
            row: its `inputs`, in that order.

        Returns:
            `dict[str, tuple[float, float]]`: numerator and denominator, of the figures that the row is of.
        """
        raise NotImplementedError(f"`{type(self).__name__}` does not say what a row counts: give it a `count`.")

    def units(self, *, inputs, **options):
        """
        What a bootstrap draws: counts of each row, or of rows that belong together.

        Args:
            inputs (`dict[str, list]`): the columns of `inputs`.
        """
        rows = zip(*(inputs[name] for name in self.inputs), strict=True)
        return [self.count(*row, **options) for row in rows]

    def _compute(self, **columns):
        inputs = {name: columns.pop(name) for name in self.inputs}
        return figures_of(self.units(inputs=inputs, **columns), self.empty)
