"""A push through a Hub that fails now and then: whole in the end, never half, and nothing sent twice that is there."""

import random
import time
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants, hf_hub_download, snapshot_download
from safetensors.numpy import save_file

from helpers.hub_faults import DROPS, RETRY_AFTER, Faults
from helpers.hub_server import Blob
from helpers.publishing import REPO, tree
from llava_mod_hf.publishing.manifest import MANIFEST_FILE
from llava_mod_hf.publishing.patience import WAITS
from llava_mod_hf.publishing.push import push_checkpoint

ASKED = ["validate", "create", "info", "preupload", "batch", "put", "verify", "commit", "resolve"]


@pytest.fixture
def waited(monkeypatch):
    """Seconds that the client and the push would have waited."""
    seconds = []
    monkeypatch.setattr(time, "sleep", seconds.append)
    return seconds


def remote(hub):
    return {path: blob.content for path, blob in hub.repos[REPO].branches["main"].files.items()}


def rewrite(folder, seed):
    """A file of either kind changes, and another comes or goes."""
    save_file({"weight": np.full(64, seed, dtype=np.float32)}, folder / "model.safetensors")
    (folder / "README.md").write_text(f"---\nlicense: mit\n---\n# Student {seed}\n")
    notes = folder / "notes.md"
    if notes.exists():
        notes.unlink()
    else:
        notes.write_text(f"{seed}")


def pushed_again_if_it_fails(folder):
    """How often a user has to call."""
    try:
        push_checkpoint(folder, REPO)
    except ConnectionError as error:
        assert "\n" not in str(error) and "whole, or not at all" in str(error)
        return 1 + pushed_again_if_it_fails(folder)
    return 1


def shown(commit):
    return {path: blob.content for path, blob in commit.files.items() if path not in (".gitattributes", MANIFEST_FILE)}


def test_twenty_random_drops_leave_a_whole_repository_and_never_half_of_one(hub, folder):
    push_checkpoint(folder, REPO)
    whole, kinds, calls = [tree(folder)], set(), 0
    for seed in range(20):
        rewrite(folder, seed)
        whole.append(tree(folder))
        place = random.Random(seed).randrange(len(ASKED))
        hub.faults = Faults(seed, kinds=DROPS, most=1, after=place)
        calls += pushed_again_if_it_fails(folder)
        assert len(hub.faults.done) == 1
        kinds |= set(hub.faults.done)
    # whatever a user could have loaded at any time
    commits = hub.repos[REPO].commits()[:-1]
    assert [shown(commit) for commit in reversed(commits)] == whole
    assert calls == 20  # each was made good without the user
    assert {kind for _, kind in kinds} == set(DROPS) and len({step for step, _ in kinds}) > 5


@pytest.mark.parametrize("seed", range(3))
def test_a_storm_of_everything_ends_with_a_whole_repository(hub, folder, waited, seed):
    push_checkpoint(folder, REPO)
    whole = [tree(folder)]
    hub.faults = Faults(seed, share=0.5)
    for number in range(3):
        rewrite(folder, number)
        whole.append(tree(folder))
        pushed_again_if_it_fails(folder)
    assert [shown(commit) for commit in reversed(hub.repos[REPO].commits()[:-1])] == whole
    assert len(hub.faults.done) > 30 and sum(waited) > 30


@pytest.mark.parametrize("step", ASKED)
@pytest.mark.parametrize("kind", ["drop", 429, 500])
def test_a_request_is_made_as_often_by_us_as_by_the_client_and_no_oftener(hub, folder, waited, step, kind):
    """Six times; where the client has already tried so often, not six times six."""
    push_checkpoint(folder, REPO)
    rewrite(folder, 1)
    (folder / "figures" / "losses.png").unlink()  # what an earlier push brought is looked up
    hub.faults = Faults(0, kinds=(kind,), steps={step})
    waited.clear()
    with pytest.raises(ConnectionError, match=r"Push again( later)?\.$"):
        push_checkpoint(folder, REPO)
    first_of_a_download = step == "resolve" and kind != "drop"  # which the client makes before it tries six times
    assert len(hub.faults.done) == 1 + len(WAITS) + first_of_a_download
    assert waited == ([RETRY_AFTER + 1] * len(WAITS) if kind == 429 else list(WAITS))


def test_a_commit_whose_answer_is_lost_is_not_made_twice(hub, folder):
    push_checkpoint(folder, REPO)
    rewrite(folder, 1)
    hub.faults = Faults(0, kinds=("lost",), steps={"commit"}, most=1)
    info = push_checkpoint(folder, REPO)
    assert len(hub.repos[REPO].commits()) == 3
    assert info.oid == hub.repos[REPO].branches["main"].oid


def test_a_commit_of_somebody_else_while_ours_was_dropped_is_not_undone(hub, folder, monkeypatch):
    push_checkpoint(folder, REPO)
    repo = hub.repos[REPO]
    rewrite(folder, 1)
    hub.faults = Faults(0, kinds=("drop",), steps={"commit"}, most=1)

    def theirs(seconds):
        repo.commit("main", "theirs", [], {**repo.branches["main"].files, "README.md": Blob(b"theirs")})

    monkeypatch.setattr(time, "sleep", theirs)
    with pytest.raises(ConnectionError, match="Somebody else committed"):
        push_checkpoint(folder, REPO)
    assert repo.branches["main"].files["README.md"].content == b"theirs"


def test_the_second_call_does_not_send_again_what_the_hub_has(hub, folder):
    """A file is the unit."""
    save_file({"weight": np.ones(64, dtype=np.float32)}, folder / "model-2.safetensors")
    hub.fail["commit"] = "drop"
    with pytest.raises(ConnectionError):
        push_checkpoint(folder, REPO)
    sent = [path for method, path in hub.requests if method == "PUT"]
    assert len(sent) == len(set(sent)) == 3  # two of weights, a figure
    hub.fail.clear()
    hub.requests.clear()
    push_checkpoint(folder, REPO)
    assert not [path for method, path in hub.requests if method == "PUT"]
    assert shown(hub.repos[REPO].branches["main"]) == tree(folder)


@pytest.mark.parametrize("seed", range(3))
def test_a_pull_is_whole_or_not_there(hub, folder, seed):
    push_checkpoint(folder, REPO)
    hub.faults = Faults(seed, share=0.4, steps={"resolve", "info"})
    for _ in range(20):
        try:
            pulled = snapshot_download(REPO, max_workers=1)
            break
        except Exception:  # the client's, of many kinds
            files = {
                path.name: path.read_bytes()
                for path in Path(constants.HF_HUB_CACHE).rglob("snapshots/**/*")
                if path.is_file()
            }
            assert files.items() <= {Path(name).name: content for name, content in remote(hub).items()}.items()
    assert len(hub.faults.done) > 3
    assert tree(Path(pulled)) == remote(hub)


def test_a_pull_goes_on_where_it_was_cut_off(hub, folder, monkeypatch):
    save_file({"weight": np.arange(100_000, dtype=np.float32)}, folder / "model.safetensors")
    push_checkpoint(folder, REPO)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    hub.faults = Faults(0, kinds=("half",), steps={"resolve"}, most=1, after=1)
    pulled = hf_hub_download(REPO, "model.safetensors")
    size = (folder / "model.safetensors").stat().st_size
    assert hub.ranges == [f"bytes={size // 2 // 10_000 * 10_000}-"]
    assert Path(pulled).read_bytes() == (folder / "model.safetensors").read_bytes()
