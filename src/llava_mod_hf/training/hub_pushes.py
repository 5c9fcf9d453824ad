"""What a trainer with `push_to_hub` brings to the Hub: the model's files alone, and nothing of this machine."""

import functools
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path

from huggingface_hub import HfApi

from llava_mod_hf.publishing.checks import check_private
from llava_mod_hf.publishing.destination import Destination
from llava_mod_hf.publishing.public_names import PublicNames
from llava_mod_hf.publishing.push import push_files, told_of_run

logger = logging.getLogger(__name__)

MODEL_FILES = (".safetensors", ".json", ".jinja", ".model", ".py", ".txt")

NOT_THE_MODELS = {"trainer_state.json"}  # which tells folders of this machine

ADAPTER_FILE = "adapter_config.json"

UNFINISHED = ".unfinished"  # folders of this name's beginning are what a run had not written to the end


def destination_of(args, *, repo_id=None, token=None, revision=None, private=None, tag=False):
    """
    Where a run is pushed.

    Args:
        args (`TrainingArguments`): with the options of [`~llava_mod_hf.training.hub_options.HubOptions`].
        repo_id (`str`, *optional*): by default `hub_model_id`, or the output folder's name.
        token (`str`, *optional*), revision (`str`, *optional*), private (`bool`, *optional*): in place of those of
            `args`.
        tag (`bool`, *optional*, defaults to `False`): whether `hub_tag` is set.

    Returns:
        [`~llava_mod_hf.publishing.destination.Destination`].
    """
    private = args.hub_private_repo if private is None else private
    return Destination(
        repo_id or args.hub_model_id or Path(args.output_dir).absolute().name,
        private=bool(private),
        revision=revision or args.hub_revision,
        tag=args.hub_tag if tag else None,
        gated=args.hub_gated,
        token=token or args.hub_token,
    )


def push_model(folder, to, *, message, output_dir, finished=False, blocking=True):
    """
    Brings the files of a model to a Hub repository, in one commit: no pickle, state of training or log.

    Args:
        folder (`str` or `Path`): holds the model, whatever else it holds.
        to ([`~llava_mod_hf.publishing.destination.Destination`]): where.
        message (`str`): the commit's.
        output_dir (`str` or `Path`): the run's folder, in which a copy lies meanwhile.
        finished (`bool`, *optional*, defaults to `False`):
            Whether that tells of this model: then its recipe, in public names, and a card go along.
        blocking (`bool`, *optional*, defaults to `True`):
            Whether to wait. If not, a failure is a warning: it should not cost a run.

    Returns:
        [`~huggingface_hub.CommitInfo`], or a `Future` of it.

    Raises:
        ValueError: if there is no model, a file names a folder of this machine or contains a token, or the Hub refuses.
        ConnectionError: if the Hub fails or does not answer.
    """
    copy = _copy_of_model(Path(folder), output_dir)
    content = {path.name: path for path in copy.iterdir()}
    told, defaults = {}, {}
    if finished and ADAPTER_FILE not in content:  # which has no config to describe
        told, defaults = told_of_run(Path(output_dir), to.repo_id)
    upload = functools.partial(_upload, copy, to, message, content | told, defaults)
    return upload() if blocking else HfApi().run_as_future(_warn_of_failure, upload)


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


def _upload(copy, to, message, content, defaults):
    try:
        # not by the client's `upload_folder`, which makes several commits of a large one
        return push_files(to, message, content, defaults)
    except (ConnectionError, ValueError) as error:
        raise type(error)(
            f"The model could not be pushed to `{to.repo_id}` ({str(error).removesuffix('.')}): it is saved on this "
            "machine, push it from there with `push_checkpoint`."
        ) from error
    finally:
        shutil.rmtree(copy, ignore_errors=True)


def _warn_of_failure(upload):
    try:
        return upload()
    except (ConnectionError, ValueError) as error:
        logger.warning("Training goes on. %s", error)
