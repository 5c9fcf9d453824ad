"""What may go to the Hub, and what of a folder does: checked before anything is sent."""

import json
import os
import re
from pathlib import Path

from huggingface_hub import get_token
from safetensors import SafetensorError, safe_open

from llava_mod_hf.fingerprints import weights_hash
from llava_mod_hf.publishing.card_checks import CARD_FILE, check_card
from llava_mod_hf.publishing.manifest import MANIFEST_FILE
from llava_mod_hf.publishing.provenance import RECIPE_FILE, RESULTS_FILE, RUN_FILE, has_results, weights_of

NEEDED = ("config.json", "*.safetensors")

PICKLES = {".bin", ".pt", ".pth", ".pkl", ".ckpt", ".pickle"}

TRAINING_STATE = ("optimizer", "rng_state")

NOT_OURS = {".git", ".cache"}  # kept by git and by huggingface_hub's downloads; the client refuses to commit them

# what a run keeps for itself: they hold paths and words of rows, the names of event logs that of the host
LEFT_BEHIND = re.compile(
    r"checkpoint-\d+(/.*)?|training_args\.bin|run\.json|"
    r"([^/]*\.)?(dropped_rows|examples|router|verdicts|(teacher_)?answers)\.jsonl|"
    r"report(_routers)?\.(html|png)|(.*/)?events\.out\.tfevents\.[^/]*"
)

HUB_TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{30,}")


def files_to_commit(folder):
    """
    The files of a folder that are committed: not those that a run keeps for itself.

    Raises:
        ValueError: if there is a link that leads out, which could name anything on this machine.
    """
    files, root = [], folder.resolve()
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if NOT_OURS.intersection(inside.parts) or LEFT_BEHIND.fullmatch(inside.as_posix()):
            continue
        if path.is_symlink() and not (path.is_file() and path.resolve().is_relative_to(root)):
            raise ValueError(
                f"`{path}` is a link to `{os.readlink(path)}`, not to a file in the folder: copy that there."
            )
        if path.is_file() and inside.as_posix() != MANIFEST_FILE:
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


def check_results(folder):
    """
    Raises:
        ValueError: if a folder has results of another model than its own; older ones do not say which they are of.
    """
    path = folder / RESULTS_FILE
    try:
        measured = weights_of(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError):  # none, or none of ours, which says nothing
        return
    if measured is not None and measured != (here := weights_hash(folder)):
        raise ValueError(
            f"`{path}` has the results of other weights ({measured}) than those beside it ({here}): run `llava-mod "
            f"evaluate --model {folder}`, or take it out."
        )


def _text_of(path):
    """The bytes of a file that may hold words: of weights the header alone."""
    with open(path, "rb") as file:
        if path.suffix != ".safetensors":
            return file.read()
        size = int.from_bytes(file.read(8), "little")
        return file.read(min(size, path.stat().st_size))


def _local_paths(folder):
    """Matches paths of this machine: its home, and where the process and the folder are."""
    # `~` where nobody knows a home
    places = {os.path.expanduser("~"), str(Path.cwd()), str(folder.resolve().parent)} - {"/", "~"}
    # `/root` alone may be a token of a vocabulary
    ends = {place: rb"/\w" if place.count("/") == 1 else rb"(?![\w.-])" for place in places}
    patterns = [re.escape(place).encode() + end for place, end in sorted(ends.items(), reverse=True)]
    return re.compile(rb"(?<![\w/.-])(?:" + b"|".join(patterns or [rb"(?!)"]) + rb")")


def check_private(folder, files):
    """
    Refuses a Hub token and paths of this machine in any of the files.

    Raises:
        ValueError: the message names the file; of a token it says nothing.
    """
    own, paths = get_token(), _local_paths(folder)
    # for the commit these are written anew, in public names
    rewritten = {RECIPE_FILE} if (folder / RUN_FILE).is_file() else set()
    rewritten |= {RESULTS_FILE} if has_results(folder) else set()
    for path in files:
        text = _text_of(path)
        if HUB_TOKEN.search(text) or (own and own.encode() in text):
            raise ValueError(f"`{path}` contains a Hub token: take it out, and revoke it if it was ever shared.")
        if path.relative_to(folder).as_posix() in rewritten:
            continue
        if found := paths.search(text):
            raise ValueError(f"`{path}` names a folder of this machine, `{found[0].decode()}…`: take it out.")


def check_card_of(folder):
    """[`check_card`] of a folder's card, if it has one."""
    card = folder / CARD_FILE
    if card.is_file():
        try:
            text = card.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"`{card}` is no text in UTF-8 ({error}): save it as such.") from error
        check_card(text, card, folder=folder)


def check_publishable(folder):
    """
    Refuses a folder that should not go to the Hub, before anything is sent.

    Args:
        folder (`str` or `Path`): A checkpoint, such as a stage of training saves or [`publish`] writes.

    Returns:
        `list[Path]`: the files that are committed.

    Raises:
        ValueError: if the folder, its config, weights or code is missing; if weights are cut; if it holds pickles,
            training state, a link that leads out, a `.gitignore`, a Hub token or a path of this machine; if its results
            are of other weights; or as
            [`check_card`].
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"`{folder}` is not a folder: give the one that was written for publishing.")
    files = files_to_commit(folder)
    for pattern in NEEDED:
        if not any(path.is_file() for path in folder.glob(pattern)):
            raise ValueError(f"`{folder}` has no {pattern} but needs {' and '.join(NEEDED)}: save the model there.")
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
    check_private(folder, files)
    _check_whole(folder)
    check_results(folder)
    check_card_of(folder)
    return files
