"""Models and data whose Hub drops the connection, fails, or answers with a page."""

import json
from types import SimpleNamespace

import datasets
import pytest
from datasets import Dataset
from huggingface_hub import constants
from transformers import AutoConfig

from helpers.disk import files_of_at_most
from helpers.hub_server import Blob, Repo
from llava_mod_hf.data.arguments import DataArguments
from llava_mod_hf.data.load import load_rows
from llava_mod_hf.hub_reading import NotRead, told_when_the_hub_fails
from llava_mod_hf.loading import WEIGHTS, load_model_and_processor
from llava_mod_hf.students.vision_layout import load_part, load_vision_layout
from llava_mod_hf.teachers.cached_rows import CachedRows

REPO = "me/things"


def model():
    load_model_and_processor(REPO)


def rows():
    load_rows(DataArguments(REPO), columns=("prompt", "completion"))


def part():
    load_part("vision tower", REPO, AutoConfig.from_pretrained, REPO)


def cache():
    CachedRows(REPO, command="llava-mod cache-teacher")


@pytest.fixture
def things(hub, monkeypatch, tmp_path):
    """A repository with a model and a data set, which nobody has downloaded."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    rows = [{"images": [], **{name: [{"role": "user", "content": "a"}] for name in ("prompt", "completion")}}]
    Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
    paths = [path for path in (WEIGHTS / "tiny-teacher").iterdir() if path.is_file()]
    files = {path.name: Blob(path.read_bytes(), lfs=path.suffix == ".safetensors") for path in paths}
    hub.repos[REPO] = Repo(private=False)
    hub.repos[REPO].commit(
        "main", "all", [], files | {"data/train.parquet": Blob((tmp_path / "train.parquet").read_bytes())}
    )
    return hub


@pytest.mark.parametrize("how", ["drop", "html", 500])
@pytest.mark.parametrize(
    ("load", "step"),
    [
        (model, "resolve"),
        (part, "resolve"),
        (rows, "resolve"),
        (rows, "info"),
        (cache, "info"),
        (cache, "resolve"),
    ],
)
def test_a_hub_that_fails_is_one_sentence(things, load, step, how):
    things.fail[step] = how
    with pytest.raises(
        ConnectionError, match=rf"^`{REPO}` could not be read from the Hub \(.*\): check the con"
    ) as error:
        load()
    assert "\n" not in str(error.value)


def test_a_vision_tower_whose_hub_is_silent_is_not_taken_for_one_without_an_image_processor(things):
    things.fail["resolve"] = "drop"
    with pytest.raises(ConnectionError, match=f"^`{REPO}` could not be read"):
        load_vision_layout(SimpleNamespace(image_size=64, patch_size=16), REPO, name=REPO)


def test_a_page_in_place_of_a_file_of_the_processor_is_one_sentence(things):
    files = things.repos[REPO].branches["main"].files
    files["tokenizer.json"] = Blob(b"<html><body>Please log in</body></html>")
    with pytest.raises(ConnectionError, match=rf"^`{REPO}` could not be read from the Hub \(Expecting value"):
        model()


def test_a_connection_that_drops_in_the_middle_is_one_sentence(things, monkeypatch):
    answered = things.lock

    class Counts:
        """The server's lock, which fails every request after the fifth."""

        count = 0

        def __enter__(self):
            answered.__enter__()
            Counts.count += 1
            if Counts.count > 5:
                things.fail["resolve"] = "drop"

        def __exit__(self, *error):
            answered.__exit__(*error)

    monkeypatch.setattr(things, "lock", Counts())
    with pytest.raises(ConnectionError, match=rf"^`{REPO}` could not be read from the Hub"):
        model()


def wrong_token(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
    return (
        ConnectionError,
        f"`{REPO}` could not be read from the Hub .*401 Unauthorized.*check the connection and",
    )


def private(hub, monkeypatch):
    hub.repos[REPO].private = True
    without_token(hub, monkeypatch)
    return (
        OSError,
        f"{REPO}. (is no file or folder, and not on the Hub or not|doesn't exist on the Hub or cannot)",
    )


def without_token(hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere")


def gated(hub, monkeypatch):
    hub.repos[REPO].gated = "auto"
    without_token(hub, monkeypatch)
    return NotRead, f"^`{REPO}` is gated: ask for access on its page at {hub.url}, and log in"


def not_let_in(hub, monkeypatch):
    hub.readers.add("hf_reader")
    gated(hub, monkeypatch)
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    return NotRead, f"^`{REPO}` is gated: ask for access on its page"


def no_network(hub, monkeypatch):
    nowhere = "http://127.0.0.1:9"
    monkeypatch.setattr(constants, "ENDPOINT", nowhere)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", nowhere + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", nowhere)
    return ConnectionError, rf"^`{REPO}` could not be read from the Hub \(.*\): check the connection"


def offline(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return OSError, "has not been downloaded before, and `HF_HUB_OFFLINE` is set: check the name|Couldn't reach"


@pytest.mark.parametrize("load", [model, rows, cache])
@pytest.mark.parametrize("what", [wrong_token, private, gated, not_let_in, no_network, offline])
def test_what_is_not_given_is_one_sentence(things, monkeypatch, load, what):
    kind, expected = what(things, monkeypatch)
    with pytest.raises(kind, match=expected) as error:
        load()
    assert "\n" not in str(error.value).strip()


@pytest.mark.parametrize("what", [gated, not_let_in])
def test_a_gated_vision_tower_is_not_taken_for_a_broken_one(things, monkeypatch, what):
    kind, expected = what(things, monkeypatch)
    with pytest.raises(kind, match=expected):
        part()


@pytest.mark.parametrize("load", [model, part, rows, cache])
def test_a_full_disk_is_one_sentence(things, load):
    """Files beyond a limit of this process cannot be written, as on a full disk."""
    with files_of_at_most(500), pytest.raises(NotRead, match=rf"^`{REPO}` could not be downloaded \(File too") as error:
        load()
    assert "HF_HOME" in str(error.value) and "\n" not in str(error.value)
    if load is not cache:  # which it is none of
        load()


def test_a_full_disk_is_not_taken_for_a_tower_without_an_image_processor(things):
    with files_of_at_most(10), pytest.raises(NotRead, match="could not be downloaded"):
        load_vision_layout(SimpleNamespace(image_size=64, patch_size=16), REPO, name=REPO)


def test_what_is_not_there_is_one_sentence(things):
    with pytest.raises(OSError, match="^`me/nothing` is no file or folder, and not on the Hub or not for"):
        load_model_and_processor("me/nothing")
    with pytest.raises(FileNotFoundError, match="'me/nothing' doesn't exist on the Hub"):
        load_rows(DataArguments("me/nothing"), columns=("prompt",))


def test_errors_of_a_folder_stay_as_they_are(tmp_path):
    with pytest.raises(ValueError, match="Expecting value"), told_when_the_hub_fails(tmp_path):
        json.loads("<html>")
