"""A Hub repository as a folder: built whole or not at all, and checked before it is pushed."""

import json
import os
import re
import tempfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import AutoProcessor

from llava_mod_hf.loading import load_whole
from llava_mod_hf.model.modeling_llava_mod import LlavaModForConditionalGeneration
from llava_mod_hf.publishing.card import render_card, write_eval_results
from llava_mod_hf.publishing.figures import plot_expert_load, plot_losses

NEEDED = ("config.json", "*.safetensors", "README.md")

PICKLES = {".bin", ".pt", ".pth", ".pkl", ".ckpt", ".pickle"}

TRAINING_STATE = ("optimizer", "rng_state")

NOT_OURS = {".git", ".cache"}  # kept by git and by huggingface_hub's downloads; the client refuses to commit them

HUB_TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{30,}")


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
    model = load_whole(LlavaModForConditionalGeneration, checkpoint, dtype="auto", local_files_only=True)
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
