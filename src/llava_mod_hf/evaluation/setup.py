"""What a measurement was made with: prompts, versions and commits, for the results and for telling answers apart."""

import subprocess
from importlib.metadata import version
from pathlib import Path

from trl import prepare_multimodal_messages

from llava_mod_hf.data.formats import pictures_of
from llava_mod_hf.fingerprints import model_hash, processor_parts, weights_hash

PACKAGES = ("llava-mod-hf", "torch", "transformers", "trl", "datasets", "evaluate")

ROOT = Path(__file__).parents[3]


def versions():
    """`dict[str, str]`: the versions of the libraries that answers and figures come from."""
    return {name: version(name) for name in PACKAGES}


def code_commit():
    """The commit of this package's checkout, `…-dirty` where files were changed; `None` of an installed one."""
    if not ((ROOT / ".git").exists() and (ROOT / "src" / "llava_mod_hf").is_dir()):
        return None
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or a checkout that it does not trust
        return None


def identity_of(model, processor, max_new_tokens):
    """
    What decides a model's greedy answer to a prompt and its pictures.

    Args:
        model (`PreTrainedModel`), processor (`ProcessorMixin`).
        max_new_tokens (`int`): where answers are cut.

    Returns:
        `dict[str, str]`: hashes and versions, by what they are of.
    """
    libraries = {name: number for name, number in versions().items() if name in PACKAGES[:3]}
    parts = {name.replace("_", " "): each for name, each in processor_parts(processor).items()}
    return {"model": model_hash(model), **parts, "max_new_tokens": str(max_new_tokens), **libraries}


def setup_of(model, processor, rows, data_args, args):
    """
    How a model was measured.

    Args:
        model, processor: what answered.
        rows (`datasets.Dataset`): that were asked.
        data_args ([`~llava_mod_hf.data.arguments.DataArguments`]), args: the options of `evaluate`.

    Returns:
        `dict`: the first prompt as the model reads it, the options and versions that the figures depend on, and what
        tells a folder's weights from others', as [`~llava_mod_hf.fingerprints.weights_hash`].
    """
    first = rows[0]
    messages = prepare_multimodal_messages(first["prompt"], images=pictures_of(first["prompt"], first["images"]))
    return {
        "first_prompt": processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True),
        "prompt_suffix": args.prompt_suffix,
        "max_new_tokens": args.max_new_tokens,
        "batch_size": args.batch_size,
        "dtype": args.dtype,
        "seed": args.seed,
        "dataset_config": data_args.dataset_config,
        "dataset_options": data_args.dataset_options,
        "dataset_test_split": data_args.dataset_test_split,
        "max_samples": data_args.max_samples,
        "versions": versions(),
        "commit": code_commit(),
        "model_commit": getattr(model.config, "_commit_hash", None),
        "weights": weights_hash(folder) if any((folder := Path(args.model)).glob("*.safetensors")) else None,
    }
