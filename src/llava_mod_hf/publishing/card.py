"""The model card and the evaluation results of a student."""

import math
import re
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml

from llava_mod_hf.recipes import packaged

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")

LABELS = {
    "exact_match": "Exact match",
    "hallucination_rate": "Hallucination rate",
    "miss_rate": "Miss rate",
    "balanced_accuracy": "Balanced accuracy",
    "kl_to_teacher": "KL divergence to the teacher, nats",
}


def _scores(results):
    """`{metric id: (label, value)}` of what was measured, exact match by kind included; refuses NaN and infinity."""
    if results.get("exact_match") is None:
        raise ValueError(f"The results are {results}, without `exact_match`: evaluate the model first.")
    named = [(metric, label, results.get(metric)) for metric, label in LABELS.items()]
    named[1:1] = [
        ("exact_match_" + re.sub(r"\W+", "_", kind), f"Exact match, {kind}", value)
        for kind, value in results.get("exact_match_by_kind", {}).items()
    ]
    for metric, _, value in named:
        if value is not None and not math.isfinite(value):
            raise ValueError(f"`{metric}` is {value}, not a finite number: leave out what was not measured.")
    return {metric: (label, float(value)) for metric, label, value in named if value is not None}


def _on_hub(names):
    """The names that look like Hub ids: the Hub refuses a card whose metadata name local folders."""
    return [name for name in names if HUB_NAME.fullmatch(name) and not Path(name).exists()] or None


def render_card(
    *,
    repo_id,
    config,
    stage,
    results,
    teacher=None,
    blind=None,
    recipe_text,
    base_models,
    datasets,
    eval_dataset="easy-VQA",
    license,
    loss_figure,
    router_figure=None,
):
    """
    The model card of a student, from the template `student.md.j2`.

    Args:
        repo_id (`str`): Where the student will be found: named in the usage snippet.
        config (`LlavaModConfig`): The student's configuration.
        stage (`str`): The last stage of training, such as `"mimic_sparse"`.
        results (`dict`): `exact_match`, and where measured `exact_match_by_kind`, `hallucination_rate`, `miss_rate`,
            `balanced_accuracy`, `kl_to_teacher`, `params_total`, `params_active`. Fractions, not percentages.
        teacher, blind (`dict`, *optional*): The same of the teacher, and of answering without looking at the image.
        recipe_text (`str`): The resolved recipe, YAML.
        base_models (`dict[str, str]`): Role, such as `"teacher"` → Hub id or name.
        datasets (`list[str]`): Hub ids or names of the training data.
        eval_dataset (`str`, *optional*, defaults to `"easy-VQA"`): What the results were measured on, its test split.
        license (`str`): The student's licence, as the Hub names it.
        loss_figure (`str`), router_figure (`str`, *optional*): Paths of the figures in the repository.

    Returns:
        [`~huggingface_hub.ModelCard`].

    Raises:
        ValueError: if `exact_match` is missing or a result is not a finite number.
    """
    columns = {"student": results, "teacher": teacher, "blind": blind}
    columns = {title: _scores(column) for title, column in columns.items() if column is not None}
    labels = {metric: label for column in columns.values() for metric, (label, _) in column.items()}
    name = repo_id.rpartition("/")[-1]
    task = {
        "task_type": "image-text-to-text",
        "task_name": "Visual question answering",
        "dataset_type": eval_dataset,
        "dataset_name": eval_dataset,
        "dataset_split": "test",
    }
    data = ModelCardData(
        model_name=name,
        license=license,
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["llava-mod", "mixture-of-experts", "distillation"],
        base_model=_on_hub(base_models.values()),
        datasets=_on_hub(datasets),
        eval_results=[
            EvalResult(**task, metric_type=metric, metric_name=label, metric_value=value)
            for metric, (label, value) in columns["student"].items()
        ],
    )
    return ModelCard.from_template(
        data,
        template_path=str(packaged("model_cards", "student.md.j2")),
        name=name,
        repo_id=repo_id,
        config=config,
        stage=stage,
        results=results,
        columns=columns,
        labels=labels,
        recipe_text=recipe_text.strip(),
        base_models=base_models,
        datasets=datasets,
        eval_dataset=eval_dataset,
        loss_figure=loss_figure,
        router_figure=router_figure,
    )


def write_eval_results(folder, results, *, eval_dataset="easy-VQA"):
    """
    Writes the scores as `.eval_results/<dataset>.yaml`, one task per metric.

    Args:
        folder (`str` or `Path`): The repository's folder.
        results (`dict`): As for [`render_card`].
        eval_dataset (`str`, *optional*, defaults to `"easy-VQA"`): What they were measured on; the Hub shows those of
            benchmarks that it has under this id.

    Returns:
        `Path`: the file.

    Raises:
        ValueError: as [`render_card`].
    """
    notes = f"{eval_dataset}, test split; a fraction between 0 and 1; measured by the authors of this repository."
    entries = [
        EvalResultEntry(dataset_id=eval_dataset, task_id=metric, value=value, notes=notes)
        for metric, (_, value) in _scores(results).items()
        if metric != "kl_to_teacher"  # compares two models: not a score of the benchmark
    ]
    slug = re.sub(r"\W+", "-", eval_dataset).lower()
    path = Path(folder) / ".eval_results" / f"{slug}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False), encoding="utf-8")
    return path
