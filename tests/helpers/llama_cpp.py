"""llama.cpp, from prebuilt binaries of npm that `make test-gguf` installs; `LLAMA_CPP` says where."""

import json
import os
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def folder():
    """Where its Node.js packages are; the test is skipped where nobody says."""
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
    return _node("llama_cpp_text.mjs", question)["answers"]


def _node(script, question):
    command = ["node", str(HERE / script), str(folder())]
    done = subprocess.run(command, input=question, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)
