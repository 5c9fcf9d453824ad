"""What is refused before anything is sent, by the file's name."""

import json
import pwd
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from helpers.publishing import REPO
from llava_mod_hf.publishing.checks import check_publishable
from llava_mod_hf.publishing.push import push_checkpoint


def test_check_publishable_lists_what_is_committed(folder):
    assert sorted(path.name for path in check_publishable(folder)) == [
        "README.md",
        "config.json",
        "losses.png",
        "model.safetensors",
    ]


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def link_out(folder):
    (folder.parent / "secret.txt").write_text("secret")
    (folder / "notes.txt").symlink_to(folder.parent / "secret.txt")


def link_folder_out(folder):
    (folder.parent / "elsewhere").mkdir()
    (folder / "data").symlink_to(folder.parent / "elsewhere")


def lose_shard(folder):
    index = {"weight_map": {"weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def lose_code(folder):
    (folder / "config.json").write_text('{"auto_map": {"AutoConfig": "configuration_llava_mod.LlavaModConfig"}}')


def add(name, content=b"x"):
    def write(folder):
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(content)

    return write


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shutil.rmtree, "is not a folder"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"has no \*.safetensors"),
        *[(add("x" + suffix), f"x{suffix}` is a pickle") for suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")],
        (add("x.pickle"), "is a pickle"),
        (add("deep/er/training_args.BIN"), "training_args.BIN` is a pickle"),
        (add("optimizer.safetensors"), "is training state"),
        (add("rng_state_0/state.json"), "is training state"),
        (add(".gitignore", b"*.safetensors"), "would make the Hub skip files"),
        (add("recipe.yaml", b"hub_token: hf_" + b"a1" * 17), "recipe.yaml` contains a Hub token"),
        (link_out, "notes.txt` is a link to .*secret.txt"),
        (link_folder_out, "data` is a link to .*elsewhere"),
        (lambda folder: (folder / "gone").symlink_to(folder / "nowhere"), "gone` is a link to .*nowhere"),
        (cut, "is not a whole safetensors file"),
        (add("model.safetensors", b""), "is not a whole safetensors file"),
        (lose_shard, "lacks model-00001-of-00002.safetensors"),
        (lose_code, "lacks configuration_llava_mod.py"),
    ],
)
def test_refusals_name_the_file_and_send_nothing(hub, folder, spoil, message):
    spoil(folder)
    with pytest.raises(ValueError, match=message) as caught:
        push_checkpoint(folder, REPO)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value) and "hf_a1" not in str(caught.value)
    assert not hub.requests


def test_link_within_the_folder_is_its_file(hub, folder):
    (folder / "copy.md").symlink_to(folder / "README.md")
    push_checkpoint(folder, REPO)
    files = hub.repos[REPO].branches["main"].files
    assert files["copy.md"].content == files["README.md"].content


def name_in_header(text):
    return lambda folder: save_file({"a": np.zeros(2)}, folder / "more.safetensors", metadata={"from": text})


TOKEN = "a-token-of-another-form"


@pytest.mark.parametrize("write", [add, lambda name, text: name_in_header(text.decode())])
@pytest.mark.parametrize("word", ["token", "home", "current folder", "own place"])
def test_secrets_are_found_in_text_and_in_headers_of_weights(hub, folder, monkeypatch, tmp_path, write, word):
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.chdir(tmp_path / "here")
    places = {"token": TOKEN, "home": f"{tmp_path}/home", "current folder": f"{tmp_path}/here", "own place": tmp_path}
    write("more.md", f"read from {places[word]}/x".encode())(folder)
    expected = "contains a Hub token" if word == "token" else f"names a folder of this machine, `{places[word]}"
    with pytest.raises(ValueError, match=rf"more\.\w+` {expected}") as caught:
        push_checkpoint(folder, REPO)
    assert TOKEN not in str(caught.value)
    assert not hub.requests


@pytest.mark.parametrize("home", ["/root", "/", "/home/me"])
def test_what_only_looks_like_a_path_of_this_machine_is_pushed(hub, folder, monkeypatch, home):
    """Vocabularies have such tokens, and addresses such parts."""
    monkeypatch.setenv("HOME", home)
    vocabulary = ["/root", "/home/me2/x", "https://host.org/home/me/x", "https://host.org/root/x", "/", "/usr/bin"]
    (folder / "tokenizer.json").write_text(json.dumps(vocabulary))
    push_checkpoint(folder, REPO)
    assert "tokenizer.json" in hub.repos[REPO].branches["main"].files


def test_a_user_without_a_home_may_publish(folder, monkeypatch):
    """As in a container that runs under any number."""
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    assert check_publishable(folder)
