"""A teacher's answers on disk: what determines them."""

from pathlib import Path

from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoProcessor

from llava_mod_hf.data.conversations import supervises_answers
from llava_mod_hf.data.parquet_shards import SHARDS_FILE, read_settings
from llava_mod_hf.fingerprints import ROW_KEY_VERSION, config_hash, processor_parts, weights_hash
from llava_mod_hf.loading import resolve
from llava_mod_hf.teachers.response_alignment import ALIGNMENT_VERSION


def _local(name):
    """Folder of a model on this machine, or `None`."""
    path = Path(resolve(name))
    if path.is_dir():
        return path
    try:
        return Path(snapshot_download(name, local_files_only=True, allow_patterns=["*.safetensors", "*.json"]))
    except (OSError, ValueError):
        return None


def mimic_settings(args, processor, columns):
    """
    What determines which of the student's tokens a cache of answers is for, and what is kept of them.

    Args:
        args ([`~llava_mod_hf.MimicConfig`]).
        processor (`ProcessorMixin`): the student's.
        columns (`Iterable[str]`): of the rows.

    Returns:
        `dict`: flat and plain, for `shards.yaml`.
    """
    answers = supervises_answers(args, columns)
    loss_on = "assistant" if args.assistant_only_loss else "completion" if answers else "all"
    return {"temperature": args.temperature, **_student_settings(args, processor, loss_on)}


def preference_settings(args, processor):
    """As [`mimic_settings`], of a cache of pairs and with a [`~llava_mod_hf.PreferenceConfig`]."""
    return _student_settings(args, processor, "pairs")


def _student_settings(args, processor, loss_on):
    parts = processor_parts(processor)
    return {
        "tokenizer": parts["tokenizer"],
        "chat template": parts["chat_template"],
        "loss on": loss_on,
        "mixed precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "no",
        "alignment version": ALIGNMENT_VERSION,
        "row key version": ROW_KEY_VERSION,
    }


def teacher_settings(teacher, *, dtype, quantization=None, trust_remote_code=False):
    """
    What determines a teacher's answers to its inputs.

    Args:
        teacher (`str`): its name; what is not on this machine, since a cache stands for it, is left out.
        dtype, quantization (`str`): of its weights in memory.
        trust_remote_code (`bool`, *optional*, defaults to `False`).

    Returns:
        `dict`: flat and plain, for `shards.yaml`.
    """
    settings = {"teacher dtype": dtype, "teacher quantization": quantization or "none"}
    folder = _local(teacher)
    if folder is not None:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        teacher_parts = processor_parts(AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code))
        settings["teacher weights"] = weights_hash(folder)
        settings["teacher config"] = config_hash(config)
        settings |= {f"teacher {name.replace('_', ' ')}": value for name, value in teacher_parts.items()}
    return settings


def check_settings(folder, expected, *, command="llava-mod cache-teacher"):
    """
    Refuses a cache of another making.

    Args:
        folder (`str` or `Path`): of the cache.
        expected (`dict`): settings of this run; those that it leaves out are not compared.
        command (`str`, *optional*): that makes such a cache.

    Returns:
        `dict`: the cache's settings.

    Raises:
        ValueError: if there is no cache, shards are missing, or a setting differs, which is named.
    """
    if not (Path(folder) / SHARDS_FILE).is_file():
        raise ValueError(f"`{folder}` has no `{SHARDS_FILE}`: make the cache with `{command}` first.")
    found = read_settings(folder)
    compare_settings(folder, found, expected)
    return found


def compare_settings(folder, found, expected):
    """
    Args:
        folder (`str` or `Path`): of a cache.
        found, expected (`dict`): its settings, and this run's; those that this leaves out are not compared.

    Raises:
        ValueError: naming the first that differs.
    """
    for name, value in expected.items():
        if found.get(name) != value:
            raise ValueError(
                f"The cache `{folder}` was made with another `{name}`: {found.get(name)!r} there, {value!r} here. Take "
                "what it was made with, or make another cache."
            )
