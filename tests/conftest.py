"""Fixtures of several test files: the tokenizer and processor of the embedded models, and tiny random students."""

import functools
import gc
import time

import pytest
from huggingface_hub import constants

from helpers import tiny
from helpers.hub_server import HubServer
from helpers.teachers import make_teacher  # noqa: F401 (a fixture)
from llava_mod_hf.commands.pretrain import train_tokenizer


@pytest.fixture(autouse=True, scope="module")
def nothing_old_to_collect():
    """
    Leaves what was made before a file's tests, the libraries' modules most of all, out of garbage collection: each
    `train` asks for a whole one, which would walk through all of it.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(384)


@pytest.fixture(scope="session")
def processor(tokenizer):
    return tiny.make_processor(tokenizer)


@pytest.fixture(scope="session")
def make_student(tokenizer):
    """`make_student(moe_layers=[0, 2], text_model_type="llama", seed=0)`: a new random student in evaluation mode."""
    return functools.partial(tiny.make_student, tokenizer)


@pytest.fixture
def hub(monkeypatch, tmp_path_factory):
    """A server that the client of this process talks to, with a token that may write, and an empty cache of it."""
    with HubServer() as server:
        # read from the environment at the client's import, which was long ago
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)  # the trainers' client, kept
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub")))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", server.token)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client backs off for 23 seconds
        yield server


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved, for a look at what they show."""
    figures = []
    monkeypatch.setattr(
        "llava_mod_hf.publishing.figures.Figure.savefig", lambda figure, *args, **kwargs: figures.append(figure)
    )
    return figures
