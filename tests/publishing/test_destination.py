"""Where a push goes: branch, tag, gate, and what of it is refused before anything is sent."""

import pytest
from huggingface_hub import HfApi

from helpers.publishing import REPO
from llava_mod_hf.publishing.destination import Destination, open_destination
from llava_mod_hf.publishing.push import push_checkpoint


def uploads(hub):
    return [path for method, path in hub.requests if path.startswith("/lfs") or "/commit/" in path]


def test_a_tag_names_the_commit_and_stays(hub, folder):
    first = push_checkpoint(folder, REPO, revision="mimic", tag="v1")
    repo = hub.repos[REPO]
    assert repo.tags == {"v1": repo.branches["mimic"]} and repo.tags["v1"].oid == first.oid
    push_checkpoint(folder, REPO, revision="mimic", tag="v1")  # nothing has changed
    (folder / "README.md").write_text("# Changed\n")
    second = push_checkpoint(folder, REPO, revision="mimic", tag="v2")
    assert {name: commit.oid for name, commit in repo.tags.items()} == {"v1": first.oid, "v2": second.oid}

    hub.requests.clear()
    with pytest.raises(ValueError, match=rf"has a tag `v1` of another commit, {first.oid[:8]}: give another name"):
        push_checkpoint(folder, REPO, revision="mimic", tag="v1")
    assert not uploads(hub)


def test_a_tag_of_what_is_there_is_not_moved(hub, folder):
    push_checkpoint(folder, REPO, tag="v1")
    (folder / "README.md").write_text("# Changed\n")
    with pytest.raises(ValueError, match="has a tag `v1` of another commit"):
        push_checkpoint(folder, REPO, tag="v1")
    assert hub.repos[REPO].tags["v1"] is hub.repos[REPO].commits()[1]


@pytest.mark.parametrize("step", ["tag", "settings", "access", "branch"])
def test_a_dropped_request_is_made_again(hub, folder, step):
    hub.fail[step] = "drop"
    with pytest.raises(ConnectionError):
        push_checkpoint(folder, REPO, revision="new", tag="v1", gated="auto")
    asked = {"tag": "/tag/", "settings": "/settings", "access": "/auth-check/", "branch": "/branch/"}[step]
    assert len([path for _, path in hub.requests if asked in path]) == 6
    hub.fail.clear()
    push_checkpoint(folder, REPO, revision="new", tag="v1", gated="auto")
    assert hub.repos[REPO].tags == {"v1": hub.repos[REPO].branches["new"]}


@pytest.mark.parametrize("gated", ["auto", "manual"])
def test_a_gate_stands_before_the_first_file(hub, folder, gated):
    push_checkpoint(folder, REPO, gated=gated)
    paths = [path for _, path in hub.requests]
    assert paths.index(f"/api/models/{REPO}/settings") < paths.index(f"/api/models/{REPO}/preupload/main")
    assert hub.repos[REPO].gated == gated
    push_checkpoint(folder, REPO)
    assert hub.repos[REPO].gated == gated


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"tag": "v 1"}, "`v 1` is no name of a tag"),
        ({"tag": "-v"}, "is no name of a tag"),
        ({"revision": "a..b"}, "is no name of a branch"),
        ({"tag": "main"}, "`main` is given as tag and as branch"),
        ({"tag": "v1", "revision": "v1"}, "`v1` is given as tag and as branch"),
        ({"gated": "yes"}, "`gated` is 'yes': give one of auto, manual"),
    ],
)
def test_names_that_the_hub_has_not_are_refused_before_it_is_asked(hub, folder, options, told):
    with pytest.raises(ValueError, match=told):
        push_checkpoint(folder, REPO, **options)
    assert not hub.requests


def test_a_token_is_not_shown():
    assert "hf_secret" not in repr(Destination(REPO, token="hf_secret"))


def test_what_would_be_refused_after_a_run_is_before(hub, monkeypatch):
    HfApi().create_repo(REPO)
    assert open_destination(Destination("tiny", revision="stage"), "llava_mod") == REPO
    assert sorted(hub.repos[REPO].branches) == ["main", "stage"]
    HfApi().create_tag(REPO, tag="v1")
    for options in ({"private": True}, {"tag": "v1"}):
        with pytest.raises(ValueError, match=f"`{REPO}`"):
            open_destination(Destination(REPO, **options), "llava_mod")
    hub.readers.add("hf_reader")
    with pytest.raises(ValueError, match=r"refused to write `me/tiny` \(HTTP 403\).*or give a name of your own"):
        open_destination(Destination(REPO, token="hf_reader"), "llava_mod")


@pytest.mark.parametrize(
    ("brought", "model_type"), [("llava_mod", "llava_mod"), ("qwen2", "llava_mod"), ("llava_mod", None)]
)
def test_another_model_in_the_repository_is_found_before_the_run(hub, brought, model_type):
    HfApi().create_repo(REPO)
    config = f'{{"model_type": "{brought}"}}'.encode()
    HfApi().upload_file(path_or_fileobj=config, path_in_repo="config.json", repo_id=REPO)
    if brought == model_type:
        assert open_destination(Destination(REPO), model_type) == REPO
        return
    with pytest.raises(ValueError, match=rf"`{REPO}` holds another model by config.json \(`{brought}`\)"):
        open_destination(Destination(REPO), model_type)
