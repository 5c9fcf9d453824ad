"""Verdicts on disk: written as they come, so that nothing is judged twice, whoever gave the answer."""

import json
import logging
import string
from pathlib import Path

from accelerate import PartialState

from llava_mod_hf.evaluation.judges import shown
from llava_mod_hf.fingerprints import content_hash

logger = logging.getLogger(__name__)


def read_prompt(path):
    """
    A judge's prompt with four `{}`: for what the picture shows, the question, the reference and the answer.

    Args:
        path (`str`): of a text file, such as your copy of a published one.

    Raises:
        ValueError: if the file is missing, or has other places to fill in.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"`judge_prompt` is `{path}`, and no such file is there: give your copy of a prompt.")
    text = path.read_text(encoding="utf-8")
    try:
        places = [name for _, name, _, _ in string.Formatter().parse(text) if name is not None]
    except ValueError as error:
        raise ValueError(f"`judge_prompt` is `{path}`, whose braces do not match ({error}): write {{}}.") from error
    if places != [""] * 4:
        raise ValueError(
            f"`judge_prompt` is `{path}`, with {len(places)} places to fill in: give four {{}}, for what the picture "
            "shows, the question, the reference and the answer."
        )
    return text


def verdicts_path(results):
    """Where the verdicts of a results file are: `results.json` → `results.verdicts.jsonl`, beside it."""
    results = Path(results)
    return results.with_name(f"{results.stem}.verdicts.jsonl")


class Verdicts:
    """
    What a judge says of answers, from a file as far as it was asked before.

    Args:
        judge: a [`~llava_mod_hf.evaluation.judges.LocalJudge`] or
            [`~llava_mod_hf.evaluation.judges.ServerJudge`], or any object with their `identity` and `verdicts`.
        path (`Path`): of JSON lines with `key`, a hash of the judge, its prompt and the answer in it, and `verdict`.
        prompt (`str`, *optional*): as of [`read_prompt`], in place of the measure's own.
    """

    def __init__(self, judge, path, prompt=None):
        self.judge, self.path, self.prompt = judge, Path(path), prompt

    def __call__(self, prompt, fields):
        """
        Args:
            prompt (`str`): the measure's own.
            fields (`list[tuple[str, ...]]`): what each answer fills in.

        Returns:
            `list[str]`: a verdict each.
        """
        prompts = [(self.prompt or prompt).format(*each) for each in fields]
        keys = [content_hash([self.judge.identity, each]) for each in prompts]
        state = PartialState()
        if state.is_main_process:
            kept, whole = self._read()
            missing = {key: each for key, each in zip(keys, prompts, strict=True) if key not in kept}
            if len(missing) < len(set(keys)):
                logger.warning("%d verdicts are taken from `%s`.", len(set(keys)) - len(missing), self.path)
            if missing:
                self._ask(missing, whole)
        state.wait_for_everyone()
        kept, _ = self._read()
        return [kept[key] for key in keys]

    def _read(self):
        """`{key: verdict}`, and the bytes of the lines that are whole: a run that was killed may leave half of one."""
        kept, whole = {}, 0
        if self.path.is_file():
            with self.path.open("rb") as file:
                for line in file:
                    try:
                        entry = json.loads(line if line.endswith(b"\n") else b"")
                        kept[entry["key"]] = entry["verdict"]
                    except (ValueError, TypeError, KeyError):
                        break
                    whole += len(line)
        return kept, whole

    def _ask(self, missing, whole):
        with self.path.open("r+b" if whole else "wb") as file:
            file.truncate(whole)
            file.seek(whole)
            verdicts = shown(self.judge.verdicts(list(missing.values())), len(missing))
            for key, verdict in zip(missing, verdicts, strict=True):
                line = json.dumps({"key": key, "verdict": verdict}, ensure_ascii=False)
                file.write((line + "\n").encode())
                file.flush()
