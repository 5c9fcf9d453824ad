"""Publishing: the model card, a whole Hub repository out of a checkpoint, and its upload in one commit."""

import json
import math
import os
import re
import tempfile
from pathlib import Path

import yaml
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    EvalResult,
    EvalResultEntry,
    HfApi,
    ModelCard,
    ModelCardData,
    eval_result_entries_to_yaml,
)
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError, safe_open
from transformers import AutoProcessor

from llava_mod_hf.modeling_llava_mod import LlavaModForConditionalGeneration
from llava_mod_hf.recipes import packaged
from llava_mod_hf.routing import plot_expert_load, plot_losses

NEEDED = ("config.json", "*.safetensors", "README.md")
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".ckpt", ".pickle"}
TRAINING_STATE = ("optimizer", "rng_state")
NOT_OURS = {".git", ".cache"}  # kept by git and by huggingface_hub's downloads; the client refuses to commit them
HUB_TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{30,}")
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
LABELS = {
    "exact_match": "Exact match",
    "hallucination_rate": "Hallucination rate",
    "miss_rate": "Miss rate",
    "balanced_accuracy": "Balanced accuracy",
    "kl_to_teacher": "KL divergence to the teacher, nats",
}


def _files(folder):
    """The files of a folder that are committed; refuses links, which could name anything on this machine."""
    files, root = [], folder.resolve()
    for path in sorted(folder.rglob("*")):
        if NOT_OURS.intersection(path.relative_to(folder).parts):
            continue
        if path.is_symlink() and not (path.is_file() and path.resolve().is_relative_to(root)):
            raise ValueError(
                f"`{path}` is a link to `{os.readlink(path)}`, not to a file in the folder: copy that there."
            )
        if path.is_file():
            files.append(path)
    return files


def _check_whole(folder):
    """Refuses cut weights, and an index or an `auto_map` that names files which are not there."""
    for path in folder.glob("*.safetensors"):
        try:
            with safe_open(path, framework="numpy"):  # compares the header with the file's size
                pass
        except SafetensorError as error:
            raise ValueError(f"`{path}` is not a whole safetensors file ({error}): save the model again.") from error
    named = set()
    for path in folder.glob("*.safetensors.index.json"):
        named |= set(json.loads(path.read_text())["weight_map"].values())
    for code in json.loads((folder / "config.json").read_text()).get("auto_map", {}).values():
        if "--" not in code:  # else the code is in another repository
            named.add(code.rpartition(".")[0] + ".py")
    if missing := sorted(name for name in named if not (folder / name).is_file()):
        raise ValueError(
            f"`{folder}` lacks {', '.join(missing)}, which its config or index names: save the model again."
        )


def check_publishable(folder):
    """
    Refuses a folder that should not go to the Hub, before anything is sent.

    Args:
        folder (`str` or `Path`): A checkpoint with its model card, such as [`publish`] writes.

    Returns:
        `list[Path]`: the files that are committed.

    Raises:
        ValueError: if the folder, its config, weights, code or card is missing; if weights are cut; if it holds
            pickles, training state, a link that leads out, a `.gitignore` or a Hub token.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"`{folder}` is not a folder: give the one that was written for publishing.")
    files = _files(folder)
    for pattern in NEEDED:
        if not any(path.is_file() for path in folder.glob(pattern)):
            raise ValueError(f"`{folder}` has no {pattern} but needs {', '.join(NEEDED)}: write it with `publish`.")
    for path in files:
        parts = path.relative_to(folder).parts
        if path.suffix.lower() in PICKLES:
            raise ValueError(
                f"`{path}` is a pickle, which runs code when loaded: save weights as .safetensors instead."
            )
        if any(part.lower().startswith(TRAINING_STATE) for part in parts):
            raise ValueError(f"`{path}` is training state, needed only to resume: leave it out of what is published.")
        if path.name == ".gitignore":
            raise ValueError(f"`{path}` would make the Hub skip files without a word: remove it.")
        if path.suffix != ".safetensors" and HUB_TOKEN.search(path.read_bytes()):
            raise ValueError(f"`{path}` contains a Hub token: take it out, and revoke it if it was ever shared.")
    _check_whole(folder)
    return files


def push_checkpoint(folder, repo_id, *, private=False, revision=None):
    """
    Makes a Hub repository equal to a folder, everything or nothing, in one commit.

    The repository and the branch are created if missing, and stay, without the files, if the upload then fails. Files
    of the repository that the folder does not have are deleted in the same commit, `.gitattributes` apart. The commit
    is refused by the Hub if somebody else committed in between. Without any difference there is no commit.

    Args:
        folder (`str` or `Path`): What [`check_publishable`] accepts.
        repo_id (`str`): `"owner/name"`, or `"name"` for the token's owner.
        private (`bool`, *optional*, defaults to `False`): Create the repository private.
        revision (`str`, *optional*, defaults to `"main"`): Branch to commit to.

    Returns:
        [`~huggingface_hub.CommitInfo`].

    Raises:
        ValueError: if the folder is refused, if the Hub refuses the token, or if `private` is asked for a repository
            that is public.
        HfHubHTTPError or RuntimeError: if the Hub or the upload of a file fails; then there is no commit.
    """
    files = check_publishable(folder)
    return _push(Path(folder), files, repo_id, "Upload LLaVA-MoD student", private=private, revision=revision)


def push_dataset(folder, repo_id, *, private=False, revision=None):
    """
    Makes a data set of the Hub equal to a folder of Parquet files and its card, as [`push_checkpoint`] does a model.

    Raises:
        ValueError: if the folder has no Parquet files or no card, or something else than them and a YAML file.
    """
    folder = Path(folder)
    files = [path for path in _files(folder) if not path.name.startswith(".")]
    strange = [path for path in files if path.suffix not in (".parquet", ".yaml") and path.name != "README.md"]
    if strange or not {".parquet", ".md"} <= {path.suffix for path in files}:
        raise ValueError(
            f"`{folder}` is not a data set to publish: it needs Parquet files and a README.md, and "
            f"{f'has `{strange[0]}` too' if strange else 'lacks some of them'}."
        )
    return _push(folder, files, repo_id, "Upload data set", repo_type="dataset", private=private, revision=revision)


def _push(folder, files, repo_id, message, *, repo_type="model", private=False, revision=None):
    """One commit that makes a repository hold these files of a folder and no others."""
    api = HfApi()
    kind = {"repo_type": repo_type}
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True, **kind).repo_id
        if private and not api.repo_info(repo_id, **kind).private:
            raise ValueError(f"`private=True` was given, but `{repo_id}` exists and is public: make it private first.")
        if revision is not None and not api.revision_exists(repo_id, revision, **kind):
            api.create_branch(repo_id, branch=revision, **kind)
        head = api.repo_info(repo_id, revision=revision, **kind)
        remote = {sibling.rfilename for sibling in head.siblings}
        if ".gitignore" in remote:
            raise ValueError(f"`{repo_id}` has a .gitignore, for which the Hub would skip files: delete it there.")
        local = {path.relative_to(folder).as_posix(): path for path in files}
        operations = [CommitOperationAdd(name, path) for name, path in local.items()]
        operations += [CommitOperationDelete(name) for name in sorted(remote - local.keys() - {".gitattributes"})]
        return api.create_commit(
            repo_id, operations, commit_message=message, revision=revision, parent_commit=head.sha, **kind
        )
    except HfHubHTTPError as error:
        if error.response.status_code not in (401, 403):
            raise
        raise ValueError(
            f"{api.endpoint} refused to write `{repo_id}` (HTTP {error.response.status_code}): log in by `hf auth "
            "login` with a token that may write there."
        ) from error


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


def _check_output(checkpoint, output_dir):
    if not (checkpoint / "config.json").is_file():
        raise ValueError(f"`{checkpoint}` has no config.json: give a folder that a stage of training saved.")
    if output_dir in (checkpoint, *checkpoint.parents):
        raise ValueError(f"`{output_dir}` holds the checkpoint `{checkpoint}`: publish to another folder.")
    if output_dir.is_dir():
        known = all((output_dir / name).is_file() for name in ("config.json", "README.md", "results.json"))
        if known or not any(output_dir.iterdir()):
            return
    if output_dir.exists():
        raise ValueError(f"`{output_dir}` exists and is not a published student: give another, or remove it first.")


def _put_in_place(new, output_dir, aside):
    """Renames, so that `output_dir` is the old folder or the whole new one, and on failure the old one."""
    had_old = output_dir.exists()
    if had_old:
        os.replace(output_dir, aside)
    try:
        os.replace(new, output_dir)
    except BaseException:
        if had_old:
            os.replace(aside, output_dir)
        raise


def publish(
    checkpoint,
    output_dir,
    *,
    results,
    teacher=None,
    blind=None,
    recipe_text,
    history,
    loads,
    eval_dataset="easy-VQA",
    **card,
):
    """
    Builds a whole Hub repository out of a trained checkpoint, ready for [`push_checkpoint`].

    Model with its code, processor, README.md, figures/, recipe.yaml, results.json and .eval_results/ are written beside
    `output_dir` and moved there when whole; what a failure leaves is the former `output_dir`.

    Args:
        checkpoint (`str` or `Path`): A folder with a saved model and processor.
        output_dir (`str` or `Path`): Where to put the repository; replaced if it holds an earlier one.
        history (`dict[str, list[dict]]`): Stage → the log of its trainer (`trainer.state.log_history`).
        loads (`dict[int, list[float]]`): Mixture-of-experts layer → share of tokens of each expert; `{}` if dense.
        results, teacher, blind, recipe_text, eval_dataset: As for [`render_card`].
        card: Its other arguments: `repo_id`, `stage`, `base_models`, `datasets`, `license`.

    Returns:
        `Path`: `output_dir`.

    Raises:
        ValueError: if the checkpoint is none, `output_dir` holds something else, `loads` is not of the model's layers,
            or the card or [`check_publishable`] refuses.
    """
    checkpoint, output_dir = Path(checkpoint).resolve(), Path(output_dir).resolve()
    _check_output(checkpoint, output_dir)
    model = LlavaModForConditionalGeneration.from_pretrained(checkpoint, dtype="auto", local_files_only=True)
    if sorted(loads) != model.config.moe_layers:
        raise ValueError(
            f"`loads` has the layers {sorted(loads)}, but the student's mixture-of-experts layers are "
            f"{model.config.moe_layers}: give the load of each, and `{{}}` for a dense student."
        )
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir.parent, prefix=f".{output_dir.name}-") as temporary:
        folder = Path(temporary, "new")
        figures = folder / "figures"
        figures.mkdir(parents=True)
        model.save_pretrained(folder)
        AutoProcessor.from_pretrained(checkpoint, local_files_only=True).save_pretrained(folder)
        plot_losses(history, figures / "losses.png")
        if loads:
            plot_expert_load(loads, figures / "expert_load.png")
        readme = render_card(
            config=model.config,
            results=results,
            teacher=teacher,
            blind=blind,
            recipe_text=recipe_text,
            eval_dataset=eval_dataset,
            loss_figure="figures/losses.png",
            router_figure="figures/expert_load.png" if loads else None,
            **card,
        )
        readme.save(folder / "README.md")
        (folder / "recipe.yaml").write_text(recipe_text, encoding="utf-8")
        measured = {"student": results, "teacher": teacher, "blind": blind}
        (folder / "results.json").write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")
        write_eval_results(folder, results, eval_dataset=eval_dataset)
        check_publishable(folder)
        _put_in_place(folder, output_dir, Path(temporary, "old"))
    return output_dir
