"""What a trainer with `push_to_hub` brings to the Hub: the model's files alone, and nothing of this machine."""

import functools
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from llava_mod_hf.publishing.checks import check_private
from llava_mod_hf.publishing.public_names import PublicNames

logger = logging.getLogger(__name__)

MODEL_FILES = (".safetensors", ".json", ".jinja", ".model", ".py", ".txt")

NOT_THE_MODELS = {"trainer_state.json"}  # which tells folders of this machine

ADAPTER_FILE = "adapter_config.json"

UNFINISHED = ".unfinished"  # folders of this name's beginning are what a run had not written to the end


def push_model(folder, repo_id, *, message, args, token=None, revision=None, blocking=True):
    """
    Brings the files of a model to a Hub repository, in one commit: no pickle, state of training, log or recipe.

    Args:
        folder (`str` or `Path`): holds the model, whatever else it holds.
        repo_id (`str`): which exists.
        message (`str`): the commit's.
        args (`TrainingArguments`): token and output folder, in which a copy lies meanwhile.
        token, revision (`str`, *optional*): in place of those of `args`.
        blocking (`bool`, *optional*, defaults to `True`):
            Whether to wait. If not, a failure is a warning: it should not cost a run.

    Returns:
        [`~huggingface_hub.CommitInfo`], or a `Future` of it.

    Raises:
        ValueError: if there is no model, or a file names a folder of this machine or contains a token.
        ConnectionError: if the Hub does not take it.
    """
    copy = _copy_of_model(Path(folder), args.output_dir)
    api = HfApi(token=token or args.hub_token)
    upload = functools.partial(_upload, api, copy, repo_id, message, revision or args.hub_revision)
    return upload() if blocking else api.run_as_future(_warn_of_failure, upload)


def _copy_of_model(folder, output_dir):
    files = [path for path in folder.iterdir() if path.suffix in MODEL_FILES and path.name not in NOT_THE_MODELS]
    if not any(path.suffix == ".safetensors" for path in files):
        raise ValueError(f"`{folder}` has no .safetensors to push: save whole weights, or leave out `push_to_hub`.")
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    copy = Path(tempfile.mkdtemp(dir=output_dir, prefix=f"{UNFINISHED}-push-"))
    try:
        for path in files:
            _link(path, copy / path.name)
        _name_base_in_public(copy / ADAPTER_FILE)
        check_private(copy, sorted(copy.iterdir()))
    except BaseException:
        shutil.rmtree(copy)
        raise
    return copy


def _link(source, target):
    """As a second name of the same file where that can be, so that weights are not written twice."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _name_base_in_public(path):
    """Writes an adapter's config anew, which names its base model by the path that it was read from."""
    if path.is_file():
        config = json.loads(path.read_text(encoding="utf-8"))
        base = config.get("base_model_name_or_path")
        config["base_model_name_or_path"] = PublicNames().public(base) if base else base
        path.unlink()  # it may be a second name of the run's own file
        path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def _upload(api, copy, repo_id, message, revision):
    try:
        return api.upload_folder(repo_id=repo_id, folder_path=copy, commit_message=message, revision=revision)
    except (HfHubHTTPError.__bases__[0], OSError, RuntimeError) as error:
        raise ConnectionError(
            f"The model could not be pushed to `{repo_id}` ({' '.join(str(error).split())}): it is saved on this "
            "machine, push it from there with `push_checkpoint`."
        ) from error
    finally:
        shutil.rmtree(copy, ignore_errors=True)


def _warn_of_failure(upload):
    try:
        return upload()
    except ConnectionError as error:
        logger.warning("Training goes on. %s", error)
