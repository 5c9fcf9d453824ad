"""llama.cpp as `make test-gguf` installs it; `LLAMA_CPP` says where."""

import json
import os
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def _folder():
    """Where it is; the test is skipped where nobody says."""
    if "LLAMA_CPP" not in os.environ:
        pytest.skip("`make test-gguf` installs llama.cpp and sets LLAMA_CPP")
    return Path(os.environ["LLAMA_CPP"]).resolve()


def package():
    """The package that writes GGUF files; where it is missing the test is skipped, but not in `make test-gguf`."""
    if "LLAMA_CPP" in os.environ:
        import gguf

        return gguf
    return pytest.importorskip("gguf", reason="gguf is not installed: `make test-gguf` installs it")


def answers(model, prompts, *, steps=8):
    """
    What llama.cpp answers, greedily and without an end.

    Args:
        model (`Path`): a GGUF file.
        prompts (`list[str]`).
        steps (`int`): tokens of each answer.

    Returns:
        `list[dict]`: `tokens` of the prompt, `generated`, `probabilities` of all tokens before each of them, `text`.
    """
    question = json.dumps({"model": str(model), "prompts": prompts, "steps": steps})
    return json.loads(_run(["node", str(HERE / "llama_cpp_text.mjs"), str(_folder())], question))["answers"]


def picture_answers(files, rows, folder, *, steps=16):
    """
    What llama.cpp answers to pictures, greedily.

    Args:
        files (`list[Path]`): the language model's and the encoder's.
        rows (`list[tuple[str, PIL.Image.Image]]`): prompts, with `<image>` where the picture goes, and pictures.
        folder (`Path`): where the pictures can be written.
        steps (`int`): tokens of an answer at most.

    Returns:
        `list[tuple[list[int], list[float]]]`: the tokens, with the one that ends the answer, and the probabilities of
        all tokens before the first of them.
    """
    question = ""
    for index, (prompt, picture) in enumerate(rows):
        picture.convert("RGB").save(folder / f"{index}.ppm")
        question += f"{steps}\n{prompt.replace('<image>', '<__media__>')}\n{folder / f'{index}.ppm'}\n"
    answers = _run([str(_folder() / "pictures"), *map(str, files)], question)
    parts = [line.split("|") for line in answers.splitlines()]
    return [([int(token) for token in left.split()], [float(p) for p in right.split()]) for left, right in parts]


def _run(command, question):
    done = subprocess.run(command, input=question, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
