"""A Hub repository as a folder: built whole or not at all."""

import dataclasses
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from llava_mod_hf.fingerprints import weights_hash
from llava_mod_hf.loading import load_model_and_processor
from llava_mod_hf.model.modeling_llava_mod import LlavaModForConditionalGeneration
from llava_mod_hf.publishing.card import render_card, write_eval_results
from llava_mod_hf.publishing.checks import check_publishable, check_results
from llava_mod_hf.publishing.figures import plot_expert_load, plot_losses
from llava_mod_hf.publishing.provenance import RECIPE_FILE, RESULTS_FILE, results_text
from llava_mod_hf.publishing.sizes import sizes_of


def _check_output(checkpoint, output_dir):
    if not (checkpoint / "config.json").is_file():
        raise ValueError(f"`{checkpoint}` has no config.json: give a folder that a stage of training saved.")
    if output_dir in (checkpoint, *checkpoint.parents):
        raise ValueError(f"`{output_dir}` holds the checkpoint `{checkpoint}`: publish to another folder.")
    if output_dir.is_dir():
        known = all((output_dir / name).is_file() for name in ("config.json", "README.md", RESULTS_FILE))
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


def publish(checkpoint, output_dir, facts, *, history, loads):
    """
    Builds a whole Hub repository out of a trained checkpoint, ready for [`push_checkpoint`].

    Model with its code, processor, README.md, figures/, recipe.yaml, results.json and .eval_results/ are written beside
    `output_dir` and moved there when whole; what a failure leaves is the former `output_dir`.

    Args:
        checkpoint (`str` or `Path`): A folder with a saved model and processor.
        output_dir (`str` or `Path`): Where to put the repository; replaced if it holds an earlier one.
        facts ([`CardFacts`]): What the card tells, the student's results and recipe among it.
        history (`dict[str, list[dict]]`): Stage → the log of its trainer (`trainer.state.log_history`).
        loads (`dict[int, list[float]]`): Mixture-of-experts layer → share of tokens of each expert; `{}` if dense.

    Returns:
        `Path`: `output_dir`.

    Raises:
        ValueError: if the checkpoint is no whole student with its processor, has results of other weights, `output_dir`
            holds something else, `loads` is not of the model's layers, or the card or [`check_publishable`] refuses.
        OSError: if the folder cannot be written, on a full disk say.
    """
    checkpoint, output_dir = Path(checkpoint).resolve(), Path(output_dir).resolve()
    _check_output(checkpoint, output_dir)
    check_results(checkpoint)
    model, processor = load_model_and_processor(str(checkpoint), dtype="auto")
    if not isinstance(model, LlavaModForConditionalGeneration):
        raise ValueError(f"`{checkpoint}` is a {type(model).__name__}, not a student of this package.")
    if sorted(loads) != model.config.moe_layers:
        raise ValueError(
            f"`loads` has the layers {sorted(loads)}, but the student's mixture-of-experts layers are "
            f"{model.config.moe_layers}: give the load of each, and `{{}}` for a dense student."
        )
    with _writing(output_dir) as temporary:
        folder = Path(temporary, "new")
        figures = folder / "figures"
        figures.mkdir(parents=True)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        if facts.weights is not None:  # in the repository's files, whose tensors may have other names
            facts = dataclasses.replace(facts, weights=weights_hash(folder))
        plot_losses(history, figures / "losses.png")
        if loads:
            plot_expert_load(loads, figures / "expert_load.png")
        router_figure = "figures/expert_load.png" if loads else None
        card = render_card(
            facts,
            model.config,
            loss_figure="figures/losses.png",
            router_figure=router_figure,
            sizes=sizes_of(folder),
        )
        card.save(folder / "README.md")
        (folder / RECIPE_FILE).write_text(facts.recipe_text, encoding="utf-8")
        (folder / RESULTS_FILE).write_text(results_text(facts), encoding="utf-8")
        write_eval_results(folder, facts)
        check_publishable(folder)
        _put_in_place(folder, output_dir, Path(temporary, "old"))
    return output_dir


@contextmanager
def _writing(output_dir):
    """A temporary folder beside another; says in one sentence that the disk is full, or what else went wrong."""
    try:
        output_dir.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output_dir.parent, prefix=f".{output_dir.name}-") as temporary:
            yield temporary
    except Exception as error:
        # the writers of weights and of tokenizers have words of their own for it
        if not isinstance(error, OSError | SafetensorError) and "os error" not in str(error):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        raise OSError(
            f"`{output_dir}` could not be written ({reason}): it is as it was before. Make room or give another "
            "`output_dir`, and publish again."
        ) from error
