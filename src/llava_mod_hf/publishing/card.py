"""The model card and the evaluation results of a student."""

import re
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml

from llava_mod_hf.publishing.public_names import TITLES, PublicNames, without_paths
from llava_mod_hf.publishing.scores import scores
from llava_mod_hf.publishing.sizes import size_text
from llava_mod_hf.recipes import packaged

# what `results.json` says of how it was measured, and anybody can use
SETUP = {
    "num_questions": int,
    "max_new_tokens": int,
    "prompt_suffix": str,
    "dtype": str,
    "versions": dict,
    "commit": str,
}

HARNESSES = {
    "lm-eval": "https://github.com/EleutherAI/lm-evaluation-harness",
    "lmms-eval": "https://github.com/EvolvingLMMs-Lab/lmms-eval",
}

# of the routers of a layer, as `llava-mod evaluate` names them
ROUTER_FIGURES = ("max_load", "load_entropy", "entropy", "dead_experts", "overloaded_experts")


@dataclass
class CardFacts:
    """
    What a card tells of a student; what is left out is said to be missing. Names of this machine are told by their
    last part alone, and link nowhere.

    Args:
        repo_id (`str`): Where the student will be found: named in the usage snippet.
        stage (`str`, *optional*): The last stage of training, such as `"mimic_sparse"`.
        license (`str`, *optional*): The student's licence, as the Hub names it.
        base_models (`dict[str, str]`, *optional*): Role, such as `"language model"` → Hub id or name.
        teachers (`list[str]`, *optional*): Hub ids or names.
        datasets (`list[str]`, *optional*): Hub ids or names of the training data.
        eval_dataset (`str`, *optional*): What the results were measured on, its test split.
        results (`dict`, *optional*): What [`~llava_mod_hf.publishing.scores.scores`] reads, and `params_total` and
            `params_active`. Fractions, not percentages.
        teacher_results, blind_results (`dict`, *optional*): The same of the teacher, and of answering without looking
            at the image.
        harness_figures (`list[HarnessFigure]`, *optional*): What lm-eval and lmms-eval measured, as
            [`~llava_mod_hf.publishing.harness_results.read_harness_results`] returns it.
        weights (`str`, *optional*): Which weights `results` are of, as [`~llava_mod_hf.fingerprints.weights_hash`].
        measured (`dict`, *optional*): How: what is recorded of [`SETUP`].
        routers (`dict`, *optional*): What `llava-mod evaluate` counted of them: `layers`, `collapsed`.
        recipe_text (`str`, *optional*): The resolved recipe, YAML.
        compression (`list[dict]`, *optional*): What `llava-mod compress` did, step by step.
        has_processor (`bool`, *optional*, defaults to `True`): Whether one is beside the model.
        names ([`PublicNames`], *optional*): Tells names of this machine from Hub ids.
    """

    repo_id: str
    stage: str | None = None
    license: str | None = None
    base_models: dict = field(default_factory=dict)
    teachers: list = field(default_factory=list)
    datasets: list = field(default_factory=list)
    eval_dataset: str | None = None
    results: dict | None = None
    teacher_results: dict | None = None
    blind_results: dict | None = None
    harness_figures: list = field(default_factory=list)
    weights: str | None = None
    measured: dict = field(default_factory=dict)
    routers: dict = field(default_factory=dict)
    recipe_text: str | None = None
    compression: list = field(default_factory=list)
    has_processor: bool = True
    names: PublicNames = field(default_factory=PublicNames)

    def __post_init__(self):
        self.recipe_text = without_paths(self.recipe_text) if self.recipe_text else None

    def columns(self):
        """`{"student": scores, …}` of those that were measured, as [`scores`] has them."""
        named = {"student": self.results, "teacher": self.teacher_results, "blind": self.blind_results}
        return {title: scores(results) for title, results in named.items() if results is not None}

    def eval_dataset_id(self):
        """The data set of the results where others find it, or `None`: no name that would link to another's."""
        name = self.eval_dataset or ""
        known = name in TITLES or name in TITLES.values() or self.names.is_hub_id(name)
        return TITLES.get(name, name) if known else None


def _metadata(facts, columns):
    """The card's metadata: what the Hub searches, links and shows beside it."""
    ids = {
        "base_model": facts.base_models.values(),
        "teacher_model": facts.teachers,
        "datasets": facts.datasets,
    }
    linked = {name: list(dict.fromkeys(filter(facts.names.is_hub_id, values))) or None for name, values in ids.items()}
    task = {
        "task_type": "image-text-to-text",
        "task_name": "Visual question answering",
        "dataset_type": facts.eval_dataset_id() or "local",
        "dataset_name": facts.names.public(facts.eval_dataset) if facts.eval_dataset else "unnamed",
        "dataset_split": "test",
    }
    return ModelCardData(
        model_name=facts.repo_id.rpartition("/")[-1] if columns or facts.harness_figures else None,
        license=facts.license,
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["llava-mod", "mixture-of-experts", "distillation"],
        # of several models the Hub would take the student for a merge
        base_model_relation="finetune" if linked["base_model"] else None,
        eval_results=[
            EvalResult(**task, metric_type=metric, metric_name=score.label, metric_value=score.value)
            for metric, score in columns.get("student", {}).items()
        ]
        + [_eval_result(facts, figure) for figure in facts.harness_figures if figure.asked == figure.questions]
        or None,
        **linked,
    )


def _eval_result(facts, figure):
    """A harness's figure in the card's metadata."""
    dataset = figure.dataset or figure.task
    return EvalResult(
        task_type="image-text-to-text",
        task_name=figure.task,
        dataset_type=dataset if facts.names.is_hub_id(dataset) else "local",
        dataset_name=facts.names.public(dataset),
        metric_type=figure.metric,
        metric_name=figure.metric,
        metric_value=figure.value,
        source_name=figure.harness,
        source_url=HARNESSES[figure.harness.split()[0]],
    )


def _router_rows(routers):
    """Rows of the table of the routers: each layer's figures, of all its tokens and of each modality."""
    return [
        (layer, tokens, *(figures.get(name) for name in ROUTER_FIGURES), _mean(figures.get("distance")))
        for layer, whole in routers.items()
        for tokens, figures in {"all": whole, **whole.get("by_modality", {})}.items()
    ]


def _mean(values):
    return sum(values) / len(values) if values else None


def render_card(facts, config, *, loss_figure=None, router_figure=None, sizes=()):
    """
    The model card of a student, from the template `student.md.j2`.

    Args:
        facts ([`CardFacts`]): What it tells.
        config ([`~transformers.PreTrainedConfig`]): The student's configuration.
        loss_figure, router_figure (`str`, *optional*): Paths of the figures in the repository.
        sizes (`Iterable[tuple[str, int]]`, *optional*): Of [`~llava_mod_hf.publishing.sizes.sizes_of`].

    Returns:
        [`~huggingface_hub.ModelCard`].

    Raises:
        ValueError: if results are given without `exact_match`, or one is not a finite number.
    """
    columns, names = facts.columns(), facts.names
    made_from = [*facts.base_models.items(), *(("teacher", name) for name in facts.teachers)]
    return ModelCard.from_template(
        _metadata(facts, columns),
        template_path=str(packaged("model_cards", "student.md.j2")),
        name=facts.repo_id.rpartition("/")[-1],
        repo_id=facts.repo_id,
        config=config,
        stage=facts.stage,
        license=facts.license,
        has_processor=facts.has_processor,
        results=facts.results or {},
        columns=columns,
        labels={metric: score for column in columns.values() for metric, score in column.items()},
        has_intervals=any(score.low is not None for column in columns.values() for score in column.values()),
        measured=facts.measured,
        routers=_router_rows(facts.routers.get("layers", {})),
        collapsed=facts.routers.get("collapsed", []),
        sizes=[(what, size_text(size)) for what, size in sizes],
        size_text=size_text,
        has_teacher=bool(facts.teachers),
        harness_figures=[(figure, names.public(figure.dataset or "–")) for figure in facts.harness_figures],
        recipe_text=(facts.recipe_text or "").strip(),
        compression=facts.compression,
        made_from=[(role, names.public(name)) for role, name in made_from],
        datasets=[names.public(name) for name in facts.datasets],
        eval_dataset=names.public(facts.eval_dataset) if facts.eval_dataset else None,
        loss_figure=loss_figure,
        router_figure=router_figure,
    )


def _interval(score):
    return "" if score.low is None else f" 95 % interval: {score.low:.4f} to {score.high:.4f}."


def write_eval_results(folder, facts):
    """
    Writes the scores as `.eval_results/<dataset>.yaml`, one task per metric.

    Args:
        folder (`str` or `Path`): The repository's folder.
        facts ([`CardFacts`]): With results; the Hub shows those of benchmarks that it has under the data set's id.

    Returns:
        `Path` or `None`: the file; none of a data set that nobody else has, whose name could be another's.

    Raises:
        ValueError: as [`render_card`].
    """
    measured, dataset = scores(facts.results), facts.eval_dataset_id()
    if dataset is None:
        return None
    notes = f"{dataset}, test split; a fraction between 0 and 1; measured by the authors of this repository."
    entries = [
        EvalResultEntry(dataset_id=dataset, task_id=metric, value=score.value, notes=notes + _interval(score))
        for metric, score in measured.items()
        if metric != "kl_to_teacher"  # compares two models: not a score of the benchmark
    ]
    slug = re.sub(r"\W+", "-", dataset).lower()
    path = Path(folder) / ".eval_results" / f"{slug}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False), encoding="utf-8")
    return path
