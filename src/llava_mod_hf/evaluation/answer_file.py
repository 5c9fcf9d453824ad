"""Answers on disk: written as they come, so that a run that was killed asks again only what is missing."""

import hashlib
import json
import logging
import os
from pathlib import Path

from accelerate import PartialState

from llava_mod_hf.evaluation.answers import generate_answers
from llava_mod_hf.fingerprints import content_hash

AT_ONCE = 100  # rows whose undecoded pictures are in memory together

logger = logging.getLogger(__name__)


def asked_keys(rows):
    """
    What identifies a question, whoever is asked: a hash of its prompt and pictures.

    Args:
        rows (`datasets.Dataset`): `images` and `prompt`.

    Returns:
        `list[str]`: sixteen hexadecimal digits for each row.
    """
    keys = []
    for batch in rows.select_columns(["images", "prompt"]).with_format("arrow").iter(AT_ONCE):
        for images, prompt in zip(*(batch[name].to_pylist() for name in ("images", "prompt")), strict=True):
            keys.append(content_hash([[_picture(image) for image in images or ()], prompt]))
    return keys


def _picture(image):
    content = Path(image["path"]).read_bytes() if image["bytes"] is None else image["bytes"]
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def read_answers(path):
    """
    A file of answers, as far as it is whole: a run that was killed may have left half a line.

    Args:
        path (`Path`).

    Returns:
        `tuple`: what identifies who answered (`dict`, empty without a first line), `{key: answer}`, and the bytes of
        the lines that are whole.
    """
    identity, given, whole = {}, {}, 0
    if not path.is_file():
        return identity, given, whole
    with path.open("rb") as file:
        for number, line in enumerate(file):
            try:
                entry = json.loads(line if line.endswith(b"\n") else b"")
                if number == 0:
                    identity = entry["identity"]
                else:
                    given[entry["key"]] = entry["given"]
            except (ValueError, TypeError, KeyError):
                break
            whole += len(line)
    return identity, given, whole


# parameters: those of `generate_answers`, and the file with what is written beside each answer
def ask(model, processor, rows, texts, *, path, identity, batch_size, max_new_tokens):
    """
    Answers to rows, each in a file as soon as it is there; those that the file has are not asked for again.

    Args:
        model, processor, batch_size, max_new_tokens: as in [`~llava_mod_hf.evaluation.answers.generate_answers`].
        rows (`datasets.Dataset`): `images` and `prompt`.
        texts (`list[dict]`): `question`, `answer` and `kind` of each, which are written beside the answer.
        path (`Path`): of JSON lines. The first has `identity`, the others `key`, as [`asked_keys`], and `given`.
        identity (`dict[str, str]`): what decides the answers to a question; a file of another one is begun anew.

    Returns:
        `list[str]`: one answer per row.
    """
    keys, state = asked_keys(rows), PartialState()
    known, kept, whole = read_answers(path)
    if known != identity:
        if kept:
            changed = [name for name in identity if known.get(name) != identity[name]]
            logger.warning("`%s` has answers by another %s: it is begun anew.", path, ", ".join(changed) or "file")
        kept, whole = {}, 0
    missing = [place for place, key in enumerate(keys) if key not in kept]
    if kept:
        logger.warning("%d of %d answers are taken from `%s`.", len(keys) - len(missing), len(keys), path)
    state.wait_for_everyone()  # each process has read it, before one writes
    places = iter(missing)
    with path.open("r+b" if whole else "wb") if state.is_main_process else open(os.devnull, "wb") as file:

        def write(entry):
            file.write((json.dumps(entry, ensure_ascii=False) + "\n").encode())
            file.flush()

        def keep(answers):
            for answer in answers:
                place = next(places)
                said = {name: texts[place][name] for name in ("question", "answer", "kind")}
                write({"key": keys[place], **said, "given": answer})

        if state.is_main_process:
            file.truncate(whole)
            file.seek(whole)
        if not whole:
            write({"identity": identity})
        found = {}
        if missing:
            answers = generate_answers(
                model, processor, rows.select(missing), batch_size=batch_size, max_new_tokens=max_new_tokens, keep=keep
            )
            found = dict(zip(missing, answers, strict=True))
    return [found[place] if place in found else kept[key] for place, key in enumerate(keys)]


def answers_for(path, rows):
    """
    Another model's answers to the same rows.

    Args:
        path (`str` or `Path`): their file, or a `results.json` that has it beside it.
        rows (`datasets.Dataset`): `images` and `prompt`.

    Raises:
        ValueError: if there is no such file, or it lacks one of the rows.
    """
    path = Path(path)
    if path.suffix == ".json":
        path = answers_path(path)
    if not path.is_file():
        raise ValueError(f"`against` leads to `{path}`, which is not there: give results or answers of `evaluate`.")
    _, given, _ = read_answers(path)
    keys = asked_keys(rows)
    lacking = [place for place, key in enumerate(keys) if key not in given]
    if lacking:
        raise ValueError(
            f"`{path}` has no answer to {len(lacking)} of {len(keys)} rows, such as row {lacking[0]}: compare "
            "answers to the same pictures and prompts, `prompt_suffix` and all."
        )
    return [given[key] for key in keys]


def answers_path(results, role=""):
    """Where the answers of a results file are: `results.json` → `results.answers.jsonl`, beside it."""
    results = Path(results)
    return results.with_name(f"{results.stem}.{role}answers.jsonl")
