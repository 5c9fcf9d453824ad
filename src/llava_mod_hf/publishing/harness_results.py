"""What lm-eval and lmms-eval measured of a model, from the files that they write, for its card."""

import math
from dataclasses import dataclass
from pathlib import Path

from llava_mod_hf.publishing.provenance import read_fields

# the harness whose version a file names, and the key of it
VERSIONS = {"lm-eval": "lm_eval_version", "lmms-eval": "lmms_eval_version"}

PATTERNS = ("results_*.json", "*_results.json")  # lm-eval's and lmms-eval's


@dataclass(frozen=True)
class HarnessFigure:
    """
    A figure of a task.

    Args:
        harness (`str`): with its version, where it is known.
        task, metric (`str`): by the harness's names.
        value (`float`).
        stderr (`float` or `None`): its standard error, where the harness gives one.
        higher_is_better (`bool` or `None`): where the task says so.
        dataset (`str` or `None`): what the task reads.
        asked, questions (`int`): how many questions it asked, and how many there are.
    """

    harness: str
    task: str
    metric: str
    value: float
    stderr: float | None
    higher_is_better: bool | None
    dataset: str | None
    asked: int
    questions: int


def read_harness_results(paths, models):
    """
    Args:
        paths (`list[str]`): files of results, or folders that hold some (`--output_path`).
        models (`list[str]`): by which names the model may have been given: folders and Hub ids.

    Returns:
        `list[HarnessFigure]`: in the order of the files, tasks and figures; those that nothing counted for left out.

    Raises:
        ValueError: if there is no such file, it is of neither harness, or of another model, or two give one figure.
    """
    figures = [figure for path in paths for file in _files(Path(path)) for figure in _figures(file, models)]
    seen = set()
    for figure in figures:
        key = (figure.harness.split()[0], figure.task, figure.metric)
        if key in seen:
            raise ValueError(
                f"`harness_results` have `{figure.metric}` of `{figure.task}` by {key[0]} twice: give one file of each "
                "task."
            )
        seen.add(key)
    return figures


def _files(path):
    if path.is_file():
        return [path]
    files = sorted({file for pattern in PATTERNS for file in path.rglob(pattern)})
    if not files:
        raise ValueError(f"`harness_results` name `{path}`, and no results are there: give what `--output_path` named.")
    return files


def _figures(path, models):
    found = read_fields(path, results=dict, configs=dict, model_name=str)
    harness = next((name for name, key in VERSIONS.items() if key in found), None)
    if harness is None:
        raise ValueError(f"`{path}` names no version of {' or '.join(VERSIONS)}: give the results of one of them.")
    if not any(_same(found["model_name"], model) for model in models):
        raise ValueError(
            f"`{path}` is of the model `{found['model_name']}`, and not of `{models[0]}`: give results of this one."
        )
    version = str(found[VERSIONS[harness]] or "")
    if version and not version.startswith("unknown"):
        harness = f"{harness} {version}"
    for task, results in found["results"].items():
        better, counts = (_of(found, key, task) for key in ("higher_is_better", "n-samples"))
        for key, value in results.items():
            metric, comma, filtered = key.partition(",")
            if not comma or "_stderr" in metric or not _is_number(value):
                continue
            stderr = results.get(f"{metric}_stderr,{filtered}")
            yield HarnessFigure(
                harness=harness,
                task=task,
                metric=metric if filtered == "none" else f"{metric} ({filtered})",
                value=float(value),
                stderr=float(stderr) if _is_number(stderr) else None,
                higher_is_better=better.get(metric),
                dataset=_dataset(_of(found, "configs", task)),
                asked=counts.get("effective", 0),
                questions=counts.get("original", 0),
            )


def _of(found, key, task):
    """What a file says of a task below a key, a `dict`; of groups some say nothing."""
    return (found.get(key) or {}).get(task) or {}


def _is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _same(name, model):
    """Whether two names are of one model: the same id, or the same folder."""
    return name == model or (Path(name).is_dir() and Path(name).resolve() == Path(model).resolve())


def _dataset(config):
    """What a task reads, ours by its rows."""
    rows = (config.get("metadata") or {}).get("rows") or {}
    own = (config.get("dataset_kwargs") or {}).get("default_rows") or {}
    return config.get("dataset_path") or rows.get("dataset_name") or own.get("dataset_name")
