"""Models and data whose Hub drops the connection, fails, or answers with a page."""

import json
from types import SimpleNamespace

import datasets
import pytest
from datasets import Dataset
from huggingface_hub import constants
from transformers import AutoConfig

from helpers.hub_server import Blob, Repo
from llava_mod_hf.data.arguments import DataArguments
from llava_mod_hf.data.load import load_rows
from llava_mod_hf.hub_reading import told_when_the_hub_fails
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
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
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


def test_what_is_not_there_is_told_as_before(things):
    with pytest.raises(OSError, match="me/nothing is not a local folder and is not a valid model identifier"):
        load_model_and_processor("me/nothing")
    with pytest.raises(FileNotFoundError, match="'me/nothing' doesn't exist on the Hub"):
        load_rows(DataArguments("me/nothing"), columns=("prompt",))


def test_errors_of_a_folder_stay_as_they_are(tmp_path):
    with pytest.raises(ValueError, match="Expecting value"), told_when_the_hub_fails(tmp_path):
        json.loads("<html>")
