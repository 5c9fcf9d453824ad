"""Publishing: the card, the repository that `publish` writes, and what the real client sends of it."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import traceback

import numpy as np
import pytest
import yaml
from huggingface_hub import HfApi, ModelCard, parse_eval_result_entries, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from safetensors.numpy import save_file
from transformers import AutoProcessor

from llava_mod_hf import LlavaModForConditionalGeneration, recipes
from llava_mod_hf.publishing import repository
from llava_mod_hf.publishing.card import render_card, write_eval_results
from llava_mod_hf.publishing.push import push_checkpoint
from llava_mod_hf.publishing.repository import check_publishable, publish

REPO = "me/tiny"
RESULTS = {
    "exact_match": 0.931,
    "exact_match_by_kind": {"yes/no": 0.902, "color": 0.993, "shape": 0.954},
    "hallucination_rate": 0.104,
    "miss_rate": 0.056,
    "balanced_accuracy": 0.92,
    "kl_to_teacher": 0.127,
    "params_total": 312345,
    "params_active": 212345,
}
TEACHER = {"exact_match": 0.978, "exact_match_by_kind": {"color": 0.999}, "kl_to_teacher": None}
BLIND = {"exact_match": 0.333, "hallucination_rate": None}
CARD = {
    "repo_id": REPO,
    "stage": "mimic_sparse",
    "base_models": {"language model": "embedded:language-model", "teacher": "someone/teacher"},
    "datasets": ["easy-VQA"],
    "license": "mit",
}
PUBLISH = {
    "results": RESULTS,
    "teacher": TEACHER,
    "blind": BLIND,
    "recipe_text": "learning_rate: 1.0e-3\nnum_experts: 4\n",
    "history": {"mimic_dense": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"train_runtime": 3.0}]},
    "loads": {0: [0.25, 0.25, 0.4, 0.1], 2: [0.25, 0.25, 0.25, 0.25]},
    **CARD,
}


def tree(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def folder(tmp_path):
    """The least that can be pushed, with one more file, in a subfolder."""
    folder = tmp_path / "student"
    (folder / "figures").mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llava_mod"}')
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Student\n")
    (folder / "figures" / "losses.png").write_bytes(b"\x89PNG" + bytes(100))
    save_file({"weight": np.arange(64, dtype=np.float32)}, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, make_student, processor):
    folder = tmp_path_factory.mktemp("checkpoint")
    make_student().save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "training_args.bin").write_bytes(b"a pickle of the trainer's")
    return folder


@pytest.fixture(scope="module")
def published(checkpoint, tmp_path_factory):
    return publish(checkpoint, tmp_path_factory.mktemp("published") / "tiny", **PUBLISH)


# push_checkpoint


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
    assert sorted(commits[0].operations) == [("deletedFile", "figures/losses.png"), ("file", "README.md")]
    assert sorted(commits[0].files) == [".gitattributes", "README.md", "config.json", "model.safetensors"]


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


def test_private_push_into_a_public_repository_is_refused(hub, folder):
    HfApi().create_repo(REPO)
    with pytest.raises(ValueError, match="exists and is public"):
        push_checkpoint(folder, REPO, private=True)
    assert len(hub.repos[REPO].commits()) == 1 and not hub.lfs


@pytest.mark.parametrize("step", ["preupload", "batch", "put", "verify", "commit"])
def test_failure_leaves_no_commit(hub, folder, step):
    push_checkpoint(folder, REPO)
    before = hub.repos[REPO].branches["main"]
    save_file({"weight": np.zeros(64, dtype=np.float32)}, folder / "model.safetensors")
    (folder / "figures" / "losses.png").unlink()
    hub.fail[step] = 500
    with pytest.raises((HfHubHTTPError, RuntimeError)):
        push_checkpoint(folder, REPO)
    assert hub.repos[REPO].branches["main"] is before

    hub.fail.clear()
    push_checkpoint(folder, REPO)
    assert len(hub.repos[REPO].commits()) == 3


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
    with pytest.raises(HfHubHTTPError, match="412"):
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


# check_publishable


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
        (lambda folder: (folder / "README.md").unlink(), "has no README.md"),
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


# the card


@pytest.fixture(scope="module")
def config(make_student):
    return make_student().config


def card(config, **changes):
    given = {"results": RESULTS, "teacher": TEACHER, "blind": BLIND, "recipe_text": "a: 1\n", "config": config, **CARD}
    return render_card(**{**given, "loss_figure": "l.png", "router_figure": "r.png", **changes})


def test_card_metadata(config):
    data = card(config).data
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "image-text-to-text", "mit")
    assert data.tags == ["llava-mod", "mixture-of-experts", "distillation"]
    assert data.base_model == ["someone/teacher"]  # an embedded name is none of the Hub's, which would refuse the card
    assert data.datasets is None
    assert {result.metric_type: result.metric_value for result in data.eval_results} == {
        "exact_match": 0.931,
        "exact_match_yes_no": 0.902,
        "exact_match_color": 0.993,
        "exact_match_shape": 0.954,
        "hallucination_rate": 0.104,
        "miss_rate": 0.056,
        "balanced_accuracy": 0.92,
        "kl_to_teacher": 0.127,
    }


def test_local_folder_is_not_a_base_model(config, tmp_path, monkeypatch):
    (tmp_path / "runs" / "teacher").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert card(config, base_models={"teacher": "runs/teacher"}).data.base_model is None


def test_card_table_has_each_number_in_its_place(config):
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in card(config).text.splitlines() if "|" in line]
    start = next(i for i, row in enumerate(rows) if row[1:] == ["student", "teacher", "blind"])
    assert rows[start + 2 : start + 10] == [
        ["Exact match ↑", "0.931", "0.978", "0.333"],
        ["Exact match, yes/no ↑", "0.902", "–", "–"],
        ["Exact match, color ↑", "0.993", "0.999", "–"],
        ["Exact match, shape ↑", "0.954", "–", "–"],
        ["Hallucination rate ↓", "0.104", "–", "–"],
        ["Miss rate ↓", "0.056", "–", "–"],
        ["Balanced accuracy ↑", "0.920", "–", "–"],
        ["KL divergence to the teacher, nats ↓", "0.127", "–", "–"],
    ]
    assert ["Parameters", "312,345"] in rows and ["Parameters active for a token", "212,345"] in rows
    assert ["Experts per layer", "4, of which each token uses 2"] in rows


def test_card_invents_no_number(config):
    """Without optional values the card has neither their rows nor `None`."""
    text = card(config, results={"exact_match": 0.5}, teacher=None, blind=None).text
    assert "0.500" in text and "None" not in text and "Parameters" not in text
    assert "allucination rate" not in text and "blind" not in text


def test_card_text(config):
    text = card(config).text
    assert "**drawn shapes**" in text and "no photographs" in text
    assert "sparse mimic distillation" in text and "2408.15881" in text
    assert "(l.png)" in text and "(r.png)" in text and "a: 1" in text
    assert "{{" not in text and "{%" not in text


def test_evaluation_data_are_not_called_training_data(config):
    text = card(config, datasets=["someone/questions"]).text
    assert "- someone/questions\n- easy-VQA, for evaluation only: https" in text
    assert card(config, datasets=["someone/questions"]).data.datasets == ["someone/questions"]
    assert "for evaluation only" not in card(config).text


def test_card_names_the_models_it_was_made_from(config):
    assert "- language model: `embedded:language-model`\n- teacher: `someone/teacher`\n" in card(config).text


def test_template_of_an_installed_package(config, tmp_path, monkeypatch):
    """A wheel has `model_cards/` inside the package."""
    (tmp_path / "llava_mod_hf" / "model_cards").mkdir(parents=True)
    (tmp_path / "llava_mod_hf" / "model_cards" / "student.md.j2").write_text("---\n{{ card_data }}\n---\n# Installed")
    monkeypatch.setattr(recipes, "__file__", str(tmp_path / "llava_mod_hf" / "recipes.py"))
    assert "# Installed" in card(config).text


def test_dense_card_says_so(make_student):
    text = card(make_student(moe_layers=()).config, router_figure=None).text
    assert "dense: no mixture of experts" in text and "Experts per layer" not in text and "r.png" not in text
    assert "None" not in text


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_number_that_is_none_is_refused(config, tmp_path, value):
    with pytest.raises(ValueError, match="`miss_rate` is (nan|inf)"):
        card(config, teacher={"exact_match": 1.0, "miss_rate": value})
    with pytest.raises(ValueError, match="`miss_rate` is (nan|inf)"):
        write_eval_results(tmp_path, {"exact_match": 1.0, "miss_rate": value})


def test_results_without_exact_match_are_refused(config):
    with pytest.raises(ValueError, match="without `exact_match`"):
        card(config, results={"miss_rate": 0.1})


def test_eval_results_are_read_by_the_client(tmp_path):
    path = write_eval_results(tmp_path, RESULTS)
    assert path == tmp_path / ".eval_results" / "easy-vqa.yaml"
    entries = parse_eval_result_entries(yaml.safe_load(path.read_text()))
    assert {entry.dataset_id for entry in entries} == {"easy-VQA"}
    assert {entry.task_id: entry.value for entry in entries} == {
        "exact_match": 0.931,
        "exact_match_yes_no": 0.902,
        "exact_match_color": 0.993,
        "exact_match_shape": 0.954,
        "hallucination_rate": 0.104,
        "miss_rate": 0.056,
        "balanced_accuracy": 0.92,
    }


# publish


def test_publish_writes_a_whole_repository(published, checkpoint):
    assert {
        "README.md",
        ".eval_results/easy-vqa.yaml",
        "config.json",
        "configuration_llava_mod.py",
        "figures/expert_load.png",
        "figures/losses.png",
        "generation_config.json",
        "model.safetensors",
        "modeling_llava_mod.py",
        "processor_config.json",
        "recipe.yaml",
        "results.json",
        "tokenizer.json",
    } <= tree(published).keys()
    assert "training_args.bin" not in tree(published)
    assert [path.name for path in published.parent.iterdir()] == ["tiny"]
    assert published.stat().st_mode & 0o777 == published.parent.joinpath("tiny", "figures").stat().st_mode & 0o777

    loaded = ModelCard.load(published / "README.md")
    assert loaded.data.eval_results[0].metric_value == 0.931 and loaded.data.model_name == "tiny"
    for figure in re.findall(r"\]\((figures/.*?)\)", loaded.text):
        assert Image.open(published / figure).format == "PNG"
    assert json.loads((published / "results.json").read_text())["student"] == RESULTS
    assert (published / "recipe.yaml").read_text() == PUBLISH["recipe_text"]
    state = LlavaModForConditionalGeneration.from_pretrained(published).state_dict()
    for name, tensor in LlavaModForConditionalGeneration.from_pretrained(checkpoint).state_dict().items():
        assert tensor.equal(state[name])
    assert AutoProcessor.from_pretrained(published).tokenizer.get_vocab()


def test_dense_student_has_no_load_figure(make_student, processor, tmp_path):
    make_student(moe_layers=()).save_pretrained(tmp_path / "dense")
    processor.save_pretrained(tmp_path / "dense")
    folder = publish(tmp_path / "dense", tmp_path / "out", **{**PUBLISH, "loads": {}})
    assert not (folder / "figures" / "expert_load.png").exists()
    assert "expert_load" not in (folder / "README.md").read_text()


@pytest.mark.parametrize("loads", [{}, {0: [0.5, 0.5]}, {0: [1.0], 1: [1.0]}])
def test_loads_of_other_layers_are_refused(checkpoint, tmp_path, loads):
    with pytest.raises(ValueError, match=r"mixture-of-experts layers are \[0, 2\]"):
        publish(checkpoint, tmp_path / "out", **{**PUBLISH, "loads": loads})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("breaks", ["plot_losses", "render_card", "write_eval_results", "check_publishable"])
def test_failure_half_way_leaves_the_old_folder(published, checkpoint, tmp_path, monkeypatch, breaks):
    old = shutil.copytree(published, tmp_path / "out")
    (old / "mark.txt").write_text("old")
    before = tree(old)

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(repository, breaks, fail)
    with pytest.raises(OSError, match="disk full"):
        publish(checkpoint, old, **PUBLISH)
    assert tree(old) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_failure_of_the_last_rename_puts_the_old_folder_back(published, checkpoint, tmp_path, monkeypatch):
    old = shutil.copytree(published, tmp_path / "out")
    before, replace, calls = tree(old), os.replace, []

    def fail_on_second(source, target):
        calls.append((source, target))
        if len(calls) == 2:
            raise OSError("disk full")
        replace(source, target)

    monkeypatch.setattr(
        os, "replace", lambda *args: replace(*args) if "out" not in str(args) else fail_on_second(*args)
    )
    with pytest.raises(OSError, match="disk full"):
        publish(checkpoint, old, **PUBLISH)
    assert tree(old) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_publishing_again_replaces_the_old_folder_whole(published, checkpoint, tmp_path):
    old = shutil.copytree(published, tmp_path / "out")
    (old / "mark.txt").write_text("old")
    publish(checkpoint, old, **PUBLISH)
    assert tree(old) == tree(published)


def test_folders_that_are_not_ours_are_left_alone(checkpoint, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "only_copy.txt").write_text("precious")
    with pytest.raises(ValueError, match="is not a published student"):
        publish(checkpoint, tmp_path / "photos", **PUBLISH)
    with pytest.raises(ValueError, match="holds the checkpoint"):
        publish(checkpoint, checkpoint.parent, **PUBLISH)
    with pytest.raises(ValueError, match="holds the checkpoint"):
        publish(checkpoint, checkpoint, **PUBLISH)
    with pytest.raises(ValueError, match="has no config.json"):
        publish(tmp_path / "photos", tmp_path / "out", **PUBLISH)
    assert (tmp_path / "photos" / "only_copy.txt").read_text() == "precious"


def test_recipe_with_a_token_is_not_published(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="contains a Hub token"):
        publish(checkpoint, tmp_path / "out", **{**PUBLISH, "recipe_text": "hub_token: hf_" + "b" * 34})
    assert not list(tmp_path.iterdir())


def test_usage_of_the_card_works_in_a_process_without_the_package(hub, published, tmp_path):
    """From the Hub, by the card's own words, in a fresh process that has the remote code alone."""
    push_checkpoint(published, REPO)
    snippet = re.search(r"```python\n(.*?)```", (published / "README.md").read_text(), re.DOTALL)[1]
    snippet += "\nimport sys\nassert 'llava_mod_hf' not in sys.modules\nprint(type(model).__module__, 'done')\n"
    Image.new("RGB", (64, 64), "teal").save(tmp_path / "image.png")
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_HUB_OFFLINE")}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
    run = subprocess.run(
        [sys.executable, "-c", snippet],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,  # transformers asks there when code is not trusted
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert re.search(r"transformers_modules\S*modeling_llava_mod done", run.stdout)
