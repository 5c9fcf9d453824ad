"""What the real client sends of a push: one commit or none, nobody else's file touched."""

import json
import re
import shutil
import traceback
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import HfApi, ModelCard, snapshot_download
from safetensors.numpy import save_file

from helpers.publishing import REPO, tree
from llava_mod_hf.publishing.manifest import MANIFEST_FILE
from llava_mod_hf.publishing.push import push_checkpoint, push_dataset


def test_push_is_one_commit_and_comes_back_byte_for_byte(hub, folder, tmp_path):
    (folder / ".cache" / "huggingface").mkdir(parents=True)
    (folder / ".cache" / "huggingface" / "lock").write_text("the client's own, never committed")
    info = push_checkpoint(folder, REPO)
    shutil.rmtree(folder / ".cache")

    commits = hub.repos[REPO].commits()
    assert [commit.message for commit in commits] == ["Upload LLaVA-MoD student", "initial commit"]
    assert info.oid == commits[0].oid
    assert not hub.repos[REPO].private
    pulled = snapshot_download(REPO, local_dir=tmp_path / "pulled")
    shutil.rmtree(tmp_path / "pulled" / ".cache", ignore_errors=True)
    (tmp_path / "pulled" / ".gitattributes").unlink()  # the Hub's own
    (tmp_path / "pulled" / MANIFEST_FILE).unlink()
    assert pulled == str(tmp_path / "pulled")
    assert tree(tmp_path / "pulled") == tree(folder)


def test_second_push_without_change_adds_nothing(hub, folder):
    first = push_checkpoint(folder, REPO)
    uploads = sum(method == "PUT" for method, _ in hub.requests)
    second = push_checkpoint(folder, REPO)
    assert second.oid == first.oid
    assert len(hub.repos[REPO].commits()) == 2
    assert sum(method == "PUT" for method, _ in hub.requests) == uploads


def test_second_push_sends_changes_and_removes_stale_files_in_one_commit(hub, folder):
    push_checkpoint(folder, REPO)
    (folder / "figures" / "losses.png").unlink()
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Another\n")
    push_checkpoint(folder, REPO)

    commits = hub.repos[REPO].commits()
    assert len(commits) == 3
    assert sorted(commits[0].operations) == [
        ("deletedFile", "figures/losses.png"),
        ("file", MANIFEST_FILE),
        ("file", "README.md"),
    ]
    assert sorted(commits[0].files) == sorted(
        [".gitattributes", MANIFEST_FILE, "README.md", "config.json", "model.safetensors"]
    )


def test_private_and_revision_are_honoured(hub, folder):
    push_checkpoint(folder, REPO, private=True, revision="v2")
    repo = hub.repos[REPO]
    assert repo.private
    assert len(repo.commits("v2")) == 2
    assert sorted(repo.branches["main"].files) == [".gitattributes"]

    (folder / "README.md").write_text("# Changed\n")
    push_checkpoint(folder, REPO, private=True, revision="v2")  # the branch exists now
    assert len(repo.commits("v2")) == 3


def test_push_by_name_alone_goes_to_the_owner_of_the_token(hub, folder):
    push_checkpoint(folder, "tiny")
    assert len(hub.repos["me/tiny"].commits()) == 2


def test_a_card_that_the_hub_refuses_is_one_sentence(hub, folder, monkeypatch):
    # what it alone knows to refuse: here, what a check of ours would have found
    monkeypatch.setattr("llava_mod_hf.publishing.checks.check_card", lambda *args, **kwargs: None)
    (folder / "README.md").write_text("---\nlicense: [mit\ntags: x\n---\n")
    with pytest.raises(ValueError, match="Invalid metadata in README.md.*nothing was committed") as caught:
        push_checkpoint(folder, REPO)
    assert "\n" not in str(caught.value)
    assert len(hub.repos[REPO].commits()) == 1 and not hub.lfs


def test_private_push_into_a_public_repository_is_refused(hub, folder):
    HfApi().create_repo(REPO)
    with pytest.raises(ValueError, match="exists and is public"):
        push_checkpoint(folder, REPO, private=True)
    assert len(hub.repos[REPO].commits()) == 1 and not hub.lfs


HALF_WAY = ["create", "info", "preupload", "batch", "put", "verify", "commit"]


@pytest.mark.parametrize(
    ("step", "how", "expected"),
    [
        *[(step, "drop", "connection to .* broke") for step in HALF_WAY],
        *[(step, 502, r"HTTP 502 \(told to fail at \w+\): .* not at all") for step in HALF_WAY],
        # of an upload the client reads the status alone
        *[(step, "html", "else than JSON") for step in HALF_WAY if step not in ("put", "verify")],
    ],
)
def test_failure_is_one_sentence_and_leaves_no_commit(hub, folder, step, how, expected):
    push_checkpoint(folder, REPO)
    before = hub.repos[REPO].branches["main"]
    save_file({"weight": np.zeros(64, dtype=np.float32)}, folder / "model.safetensors")
    (folder / "figures" / "losses.png").unlink()
    hub.fail[step] = how
    with pytest.raises(ConnectionError, match=expected) as caught:
        push_checkpoint(folder, REPO)
    told = str(caught.value)
    assert "\n" not in told and told.endswith(".") and hub.url in told and hub.token not in told
    assert hub.repos[REPO].branches["main"] is before

    hub.fail.clear()
    push_checkpoint(folder, REPO)
    assert len(hub.repos[REPO].commits()) == 3


def test_what_the_hub_says_is_handed_on(hub, folder):
    hub.fail["commit"] = 400
    with pytest.raises(ValueError, match=r"HTTP 400 \(told to fail at commit\): nothing was committed"):
        push_checkpoint(folder, REPO)


def test_commit_of_somebody_else_in_between_is_not_undone(hub, folder, monkeypatch):
    push_checkpoint(folder, REPO)
    repo = hub.repos[REPO]
    create_commit = HfApi.create_commit

    def late(self, *args, **kwargs):
        files = {**repo.branches["main"].files, "theirs.md": repo.branches["main"].files["README.md"]}
        repo.commit("main", "theirs", [], files)
        return create_commit(self, *args, **kwargs)

    monkeypatch.setattr(HfApi, "create_commit", late)
    (folder / "README.md").write_text("ours")
    with pytest.raises(ConnectionError, match="412"):
        push_checkpoint(folder, REPO)
    assert repo.branches["main"].message == "theirs"


def test_wrong_token_is_one_sentence_without_the_token(hub, folder, monkeypatch, caplog, capfd):
    wrong = "hf_" + "x" * 34
    monkeypatch.setenv("HF_TOKEN", wrong)
    with pytest.raises(ValueError, match=r"refused to write `me/tiny` \(HTTP 401\).*log in") as caught:
        push_checkpoint(folder, REPO)
    assert "\n" not in str(caught.value)
    told = "".join(traceback.format_exception(caught.value)) + caplog.text + "".join(capfd.readouterr())
    assert wrong not in told
    assert not hub.repos


@pytest.mark.parametrize("step", ["create", "preupload", "commit"])
def test_missing_permission_is_told_as_such(hub, folder, step):
    hub.fail[step] = 403
    with pytest.raises(ValueError, match=r"HTTP 403.*token that may write there"):
        push_checkpoint(folder, REPO)


def test_read_only_token_cannot_touch_an_existing_repository(hub, folder, monkeypatch):
    push_checkpoint(folder, REPO)
    hub.readers.add("hf_reader")
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    with pytest.raises(ValueError, match="HTTP 403"):
        push_checkpoint(folder, REPO)
    assert len(hub.repos[REPO].commits()) == 2


def test_gitignore_in_the_repository_is_refused(hub, folder):
    push_checkpoint(folder, REPO)
    api = HfApi()
    api.upload_file(path_or_fileobj=b"*.safetensors\n", path_in_repo=".gitignore", repo_id=REPO)
    with pytest.raises(ValueError, match=".gitignore"):
        push_checkpoint(folder, REPO)


def test_server_tags_lists_and_deletes(hub, folder):
    info = push_checkpoint(folder, REPO)
    api = HfApi()
    api.create_tag(REPO, tag="v1.0", revision="main")
    assert [tag.target_commit for tag in api.list_repo_refs(REPO).tags] == [info.oid]
    assert [entry.path for entry in api.list_repo_tree(REPO, revision="v1.0", path_in_repo="figures")] == [
        "figures/losses.png"
    ]
    assert api.get_paths_info(REPO, ["README.md"])[0].size == (folder / "README.md").stat().st_size
    assert next(commit.commit_id for commit in api.list_repo_commits(REPO)) == info.oid
    api.delete_tag(REPO, tag="v1.0")
    api.delete_repo(REPO)
    assert not hub.repos


# files of others

FOREIGN = {"LICENSE": b"theirs", "onnx/decoder.png": b"large and theirs", "figures/ours.png": b"theirs too"}


def put(path, content):
    """As somebody else commits to the repository."""
    HfApi().upload_file(path_or_fileobj=content, path_in_repo=path, repo_id=REPO)


def remote(hub, repo_id=REPO):
    """`{path: bytes}` of the repository's files, but for those of the Hub and of the push itself."""
    files = hub.repos[repo_id].branches["main"].files
    return {path: blob.content for path, blob in files.items() if path not in (".gitattributes", MANIFEST_FILE)}


@pytest.mark.parametrize("mirror", [False, True])
def test_only_a_mirror_deletes_files_of_others(hub, folder, mirror):
    push_checkpoint(folder, REPO)
    for path, content in FOREIGN.items():
        put(path, content)
    (folder / "README.md").write_text("# Changed\n")
    push_checkpoint(folder, REPO, mirror=mirror)
    assert remote(hub) == tree(folder) | ({} if mirror else FOREIGN)
    assert hub.repos[REPO].commits()[0].message == "Upload LLaVA-MoD student"
    assert len(hub.repos[REPO].commits()) == 2 + len(FOREIGN) + 1


@pytest.mark.parametrize(("name", "lfs"), [("figures/losses.png", True), ("notes.md", False)])
def test_what_we_brought_and_no_longer_have_goes_unless_somebody_made_it_theirs(hub, folder, name, lfs):
    (folder / "notes.md").write_text("ours")
    push_checkpoint(folder, REPO)
    assert hub.repos[REPO].branches["main"].files[name].lfs == lfs
    (folder / name).unlink()
    push_checkpoint(folder, REPO)
    assert remote(hub) == tree(folder)

    (folder / name).write_bytes(b"ours again")
    push_checkpoint(folder, REPO)
    put(name, b"theirs now")
    (folder / name).unlink()
    push_checkpoint(folder, REPO)
    assert remote(hub) == tree(folder) | {name: b"theirs now"}
    push_checkpoint(folder, REPO)
    assert remote(hub) == tree(folder) | {name: b"theirs now"}


@pytest.mark.parametrize("text", [b"", b"[]", b'{"sha256": 3}', b"<html>"])
def test_a_list_that_is_not_ours_makes_no_file_ours(hub, folder, text):
    push_checkpoint(folder, REPO)
    put(MANIFEST_FILE, text)
    (folder / "figures" / "losses.png").unlink()
    push_checkpoint(folder, REPO)
    assert "figures/losses.png" in remote(hub)


def test_a_pulled_folder_is_pushed_without_its_list(hub, folder, tmp_path):
    """The list is of what a push brings, never brought itself."""
    push_checkpoint(folder, REPO)
    snapshot_download(REPO, local_dir=tmp_path / "pulled")
    (tmp_path / "pulled" / ".gitattributes").unlink()
    push_checkpoint(tmp_path / "pulled", REPO)
    assert len(hub.repos[REPO].commits()) == 2


def test_a_data_set_leaves_files_of_others(hub, tmp_path):
    (tmp_path / "0-of-2.parquet").write_bytes(b"rows")
    (tmp_path / "README.md").write_text("# Rows")
    push_dataset(tmp_path, REPO)
    api = HfApi()
    api.upload_file(path_or_fileobj=b"x", path_in_repo="LICENSE", repo_id=REPO, repo_type="dataset")
    (tmp_path / "0-of-2.parquet").rename(tmp_path / "0-of-1.parquet")
    push_dataset(tmp_path, REPO)
    assert sorted(remote(hub)) == ["0-of-1.parquet", "LICENSE", "README.md"]


# a model of others


@pytest.mark.parametrize(
    ("name", "config", "told"),
    [
        ("config.json", b'{"model_type": "qwen2"}', r"another model by config.json \(`qwen2`\)"),
        ("config.json", b"<html>", "another model by config.json"),
        ("adapter_config.json", b'{"peft_type": "LORA"}', "another model by adapter_config.json"),
    ],
)
def test_another_model_is_not_mixed_with_ours(hub, folder, name, config, told):
    HfApi().create_repo(REPO)
    put(name, config)
    put("model-00001-of-00002.safetensors", b"theirs")
    before = hub.repos[REPO].branches["main"]
    with pytest.raises(ValueError, match=f"`{REPO}` holds {told}, which no push of this package brought") as caught:
        push_checkpoint(folder, REPO)
    assert "\n" not in str(caught.value) and hub.repos[REPO].branches["main"] is before and len(hub.lfs) == 1
    push_checkpoint(folder, REPO, mirror=True)
    assert remote(hub) == tree(folder)


def test_a_student_that_others_pushed_and_a_later_one_of_ours_are_replaced(hub, folder):
    HfApi().create_repo(REPO)
    put("config.json", b'{"model_type": "llava_mod", "by": "a stock trainer"}')
    push_checkpoint(folder, REPO)
    (folder / "config.json").write_text('{"model_type": "llava"}')  # exported, say
    push_checkpoint(folder, REPO)
    assert remote(hub) == tree(folder)


# a folder without a card


def test_a_folder_without_a_card_is_pushed_with_one(hub, make_student, processor, tmp_path):
    student = make_student()
    student.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    before = tree(tmp_path)
    push_checkpoint(tmp_path, REPO)
    assert len(hub.repos[REPO].commits()) == 2
    card = ModelCard(remote(hub)["README.md"].decode())
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "image-text-to-text")
    unknown = ("license", "base_model", "base_model_relation", "datasets", "teacher_model", "model-index", "model_name")
    assert not set(unknown) & card.data.to_dict().keys()
    for missing in (
        "No licence was stated",
        "How it was trained is not recorded",
        "Which models it was made from is not recorded",
        "Its recipe is not recorded",
        "What it was trained on is not recorded",
        "No evaluation came with this checkpoint",
    ):
        assert missing in card.text
    assert "llama, 3 layers, 2 of them mixtures of experts (0, 2)" in card.text
    assert "None" not in card.text and "](" not in card.text.replace("](https://", "")
    assert "No processor" not in card.text
    assert tree(tmp_path) == before
    push_checkpoint(tmp_path, REPO)
    assert len(hub.repos[REPO].commits()) == 2


def test_a_card_that_somebody_wrote_stays_until_the_folder_has_one(hub, folder):
    (folder / "README.md").unlink()
    push_checkpoint(folder, REPO)
    written = remote(hub)["README.md"]
    config = {"model_type": "llava_mod", "num_experts": 8}
    (folder / "config.json").write_text(json.dumps(config))
    push_checkpoint(folder, REPO)
    assert b"No processor came with this checkpoint" in written
    assert b"Usage" in written and b"Usage" in remote(hub)["README.md"]

    put("README.md", b"# By hand")
    push_checkpoint(folder, REPO)
    assert remote(hub)["README.md"] == b"# By hand"
    push_checkpoint(folder, REPO, mirror=True)
    assert b"Usage" in remote(hub)["README.md"]
    (folder / "README.md").write_text("# Ours")
    push_checkpoint(folder, REPO)
    assert remote(hub)["README.md"] == b"# Ours"


def test_the_page_on_sharing_pushes(hub, folder, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "sharing.md").read_text()
    example, _ = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    shutil.copytree(folder, folder.parent / "runs" / "tiny" / "prefer")
    monkeypatch.chdir(folder.parent)
    names = {}
    exec(example, names)
    assert names["commit"].oid == hub.repos["you/student"].branches["main"].oid
    assert hub.repos["you/student"].private
    assert f"`{MANIFEST_FILE}`" in page
