"""From a folder to one commit on the Hub."""

from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from transformers import AutoConfig

from llava_mod_hf.publishing.card import render_card
from llava_mod_hf.publishing.card_checks import CARD_FILE, check_card
from llava_mod_hf.publishing.checks import check_card_of, check_private, check_publishable, files_to_commit
from llava_mod_hf.publishing.destination import Destination, told_in_a_sentence
from llava_mod_hf.publishing.manifest import MANIFEST_FILE, MODEL_CONFIGS, RemoteFiles, manifest_of
from llava_mod_hf.publishing.patience import patiently
from llava_mod_hf.publishing.provenance import (
    RECIPE_FILE,
    RESULTS_FILE,
    RUN_FILE,
    gather_facts,
    has_results,
    results_text,
)
from llava_mod_hf.publishing.sizes import sizes_of


def push_checkpoint(folder, repo_id, *, private=False, revision=None, mirror=False, tag=None, gated=None):
    """
    Brings a folder to a Hub repository, everything or nothing, in one commit.

    The repository and the branch are created if missing, and stay, without the files, if the upload then fails. A file
    of the folder replaces that of the same name; what an earlier push brought, and the folder no longer has, is deleted
    in the same commit. Files that others put there stay: `.llava_mod_files.json` in the repository lists ours. The
    commit is refused by the Hub if somebody else committed in between. Without any difference there is no commit. What
    the Hub does not answer is asked for again for half a minute, or as long as it says.

    A folder without a card gets one in the repository, unless that has somebody's already: it tells what the config,
    `run.json` and `results.json` tell, and names what they leave out. Of a stage's output folder, what only serves the
    run stays behind (`run.json`, `checkpoint-*`, `training_args.bin`, event logs), and in `recipe.yaml` and
    `results.json` paths of this machine become names.

    Args:
        folder (`str` or `Path`): What [`check_publishable`] accepts.
        repo_id (`str`): `"owner/name"`, or `"name"` for the token's owner.
        private, revision, mirror, tag, gated: as of [`Destination`].

    Returns:
        [`~huggingface_hub.CommitInfo`].

    Raises:
        ValueError: if the folder is refused, if the Hub refuses the token or what is sent, if `private` is asked for a
            repository that is public, or if it has the tag already, of another commit.
        ConnectionError: if the Hub fails or does not answer, or the upload of a file fails; then there is no commit.
    """
    folder = Path(folder)
    content = {path.relative_to(folder).as_posix(): path for path in check_publishable(folder)}
    told, defaults = told_of_run(folder, repo_id, has_card=CARD_FILE in content)
    content |= {name: text for name, text in told.items() if name in content}
    destination = Destination(repo_id, private=private, revision=revision, mirror=mirror, tag=tag, gated=gated)
    return push_files(destination, "Upload LLaVA-MoD student", content, defaults)


def told_of_run(folder, repo_id, *, has_card=False):
    """
    What is written anew of a folder, or beside it, for others to read.

    Args:
        folder (`Path`): a checkpoint.
        repo_id (`str`): where it will be found.
        has_card (`bool`, *optional*, defaults to `False`): whether it has a card of its own.

    Returns:
        `tuple`: the `recipe.yaml` of a run's folder and the `results.json` of any in public names, and a card where
        there is none; each name → `bytes`.
    """
    told, defaults = {}, {}
    is_run, measured = (folder / RUN_FILE).is_file(), has_results(folder)
    if is_run or measured or not has_card:
        facts = gather_facts(folder, repo_id)
        if not has_card:
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
            card = render_card(facts, config, sizes=sizes_of(folder))
            check_card(str(card), CARD_FILE)
            defaults[CARD_FILE] = str(card).encode()
        if is_run:
            told[RECIPE_FILE] = facts.recipe_text.encode()
        if measured:
            told[RESULTS_FILE] = results_text(facts).encode()
    return told, defaults


def push_dataset(folder, repo_id, *, private=False, revision=None, mirror=False, tag=None, gated=None):
    """
    Brings a folder of Parquet files and their card to a data set of the Hub, as [`push_checkpoint`] does a model.

    Raises:
        ValueError: if the folder has no Parquet files or no card, or something else than them and a YAML file.
    """
    folder = Path(folder)
    files = [path for path in files_to_commit(folder) if not path.name.startswith(".")]
    strange = [path for path in files if path.suffix not in (".parquet", ".yaml", ".b2sum") and path.name != CARD_FILE]
    if strange or not {".parquet", ".md"} <= {path.suffix for path in files}:
        raise ValueError(
            f"`{folder}` is not a data set to publish: it needs Parquet files and a README.md, and "
            f"{f'has `{strange[0]}` too' if strange else 'lacks some of them'}."
        )
    check_private(folder, files)
    check_card_of(folder)
    content = {path.relative_to(folder).as_posix(): path for path in files}
    destination = Destination(
        repo_id, repo_type="dataset", private=private, revision=revision, mirror=mirror, tag=tag, gated=gated
    )
    return push_files(destination, "Upload data set", content, {})


def push_files(to, message, content, defaults):
    """
    Brings files to a repository, in one commit.

    Args:
        to ([`Destination`]): where.
        message (`str`): the commit's.
        content (`dict[str, Path | bytes]`): path in the repository → file, brought whatever is there.
        defaults (`dict[str, bytes]`): the same, unless there is one that is not ours.

    Returns:
        [`~huggingface_hub.CommitInfo`].

    Raises:
        ValueError, ConnectionError: as [`push_checkpoint`].
    """
    api = HfApi(token=to.token)
    with told_in_a_sentence(api.endpoint, to.repo_id):
        to, parent = to.opened(api)
        commit = patiently(_commit, api, to, message, content, defaults, parent)
        if to.tag is not None:
            to.set_tag(api, commit.oid)
        return commit


def _commit(api, to, message, content, defaults, parent):
    """
    Everything in one commit, upon one that was the last when the push began.

    Made again after an answer was lost, it finds nothing to change if the commit is there, and if not it does not send
    again what the Hub has. It is refused if somebody else committed meanwhile.
    """
    kind = {"repo_type": to.repo_type}
    head = api.repo_info(to.repo_id, revision=to.revision, files_metadata=True, **kind)
    remote = RemoteFiles(api, head, to.repo_type)
    if ".gitignore" in remote.names:
        raise ValueError(f"`{to.repo_id}` has a .gitignore, for which the Hub would skip files: delete it there.")
    # what is there and not brought: the only files that may have to go, or to stay in a default's place
    kept = remote.names - content.keys() - {".gitattributes", MANIFEST_FILE}
    replaced = kept if to.mirror else remote.ours_among(kept)
    if to.repo_type == "model" and not to.mirror:
        configs = {name: content[name] for name in MODEL_CONFIGS if name in content}
        remote.check_same_model({name: Path(file).read_bytes() for name, file in configs.items()})
    content = {name: text for name, text in defaults.items() if name not in kept - replaced} | content
    additions = [CommitOperationAdd(name, file) for name, file in sorted(content.items())]
    deletions = [CommitOperationDelete(name) for name in sorted(replaced - content.keys())]
    return api.create_commit(
        to.repo_id,
        [*additions, manifest_of(additions), *deletions],
        commit_message=message,
        revision=to.revision,
        parent_commit=parent,
        **kind,
    )
