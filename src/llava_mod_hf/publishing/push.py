"""From a folder to one commit on the Hub."""

import dataclasses
import json
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from transformers import AutoConfig

from llava_mod_hf.publishing.card import render_card
from llava_mod_hf.publishing.checks import check_private, check_publishable, files_to_commit
from llava_mod_hf.publishing.manifest import MANIFEST_FILE, manifest_of, ours_among
from llava_mod_hf.publishing.patience import NO_ANSWER, PASSING, patiently
from llava_mod_hf.publishing.provenance import RECIPE_FILE, RESULTS_FILE, RUN_FILE, gather_facts, results_text

CARD_FILE = "README.md"


def push_checkpoint(folder, repo_id, *, private=False, revision=None, mirror=False):
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
        private (`bool`, *optional*, defaults to `False`): Create the repository private.
        revision (`str`, *optional*, defaults to `"main"`): Branch to commit to.
        mirror (`bool`, *optional*, defaults to `False`):
            Make the repository equal to the folder: delete every other file, whosever it is, `.gitattributes` apart.

    Returns:
        [`~huggingface_hub.CommitInfo`].

    Raises:
        ValueError: if the folder is refused, if the Hub refuses the token or what is sent, or if `private` is asked for
            a repository that is public.
        ConnectionError: if the Hub fails or does not answer, or the upload of a file fails; then there is no commit.
    """
    folder = Path(folder)
    content = {path.relative_to(folder).as_posix(): path for path in check_publishable(folder)}
    defaults = {}
    if CARD_FILE not in content or (folder / RUN_FILE).is_file():
        facts = gather_facts(folder, repo_id)
        if CARD_FILE not in content:
            card = render_card(facts, AutoConfig.from_pretrained(folder, local_files_only=True))
            defaults[CARD_FILE] = str(card).encode()
        if (folder / RUN_FILE).is_file():
            told = {RECIPE_FILE: facts.recipe_text, RESULTS_FILE: results_text(facts)}
            content |= {name: text.encode() for name, text in told.items() if name in content}
    destination = Destination(repo_id, private=private, revision=revision, mirror=mirror)
    return _push(destination, "Upload LLaVA-MoD student", content, defaults)


def push_dataset(folder, repo_id, *, private=False, revision=None, mirror=False):
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
    content = {path.relative_to(folder).as_posix(): path for path in files}
    destination = Destination(repo_id, repo_type="dataset", private=private, revision=revision, mirror=mirror)
    return _push(destination, "Upload data set", content, {})


@dataclass(frozen=True)
class Destination:
    """
    Where a push goes.

    Args:
        repo_id (`str`), repo_type (`str`, *optional*, defaults to `"model"`), revision (`str`, *optional*): as the Hub
            names it.
        private (`bool`, *optional*, defaults to `False`), mirror (`bool`, *optional*, defaults to `False`): as in
            [`push_checkpoint`].
    """

    repo_id: str
    repo_type: str = "model"
    private: bool = False
    revision: str | None = None
    mirror: bool = False


def _push(to, message, content, defaults):
    """
    One commit.

    Args:
        to ([`Destination`]): where.
        message (`str`): the commit's.
        content (`dict[str, Path | bytes]`): path in the repository → file, brought whatever is there.
        defaults (`dict[str, bytes]`): the same, unless there is one that is not ours.
    """
    api = HfApi()
    with _told_in_a_sentence(api.endpoint, to.repo_id):
        to, parent = _begin(api, to)
        return patiently(_commit, api, to, message, content, defaults, parent)


def _begin(api, to):
    """The destination by its whole name, made if missing, and the commit that a push goes on from."""
    kind = {"repo_type": to.repo_type}
    created = patiently(api.create_repo, to.repo_id, private=to.private, exist_ok=True, **kind)
    to = dataclasses.replace(to, repo_id=created.repo_id)
    if to.private and not patiently(api.repo_info, to.repo_id, **kind).private:
        raise ValueError(f"`private=True` was given, but `{to.repo_id}` exists and is public: make it private first.")
    if to.revision is not None and not patiently(api.revision_exists, to.repo_id, to.revision, **kind):
        patiently(api.create_branch, to.repo_id, branch=to.revision, exist_ok=True, **kind)
    return to, patiently(api.repo_info, to.repo_id, revision=to.revision, **kind).sha


def _commit(api, to, message, content, defaults, parent):
    """
    Everything in one commit, upon one that was the last when the push began.

    Made again after an answer was lost, it finds nothing to change if the commit is there, and if not it does not send
    again what the Hub has. It is refused if somebody else committed meanwhile.
    """
    kind = {"repo_type": to.repo_type}
    head = api.repo_info(to.repo_id, revision=to.revision, files_metadata=True, **kind)
    remote = {sibling.rfilename for sibling in head.siblings}
    if ".gitignore" in remote:
        raise ValueError(f"`{to.repo_id}` has a .gitignore, for which the Hub would skip files: delete it there.")
    # what is there and not brought: the only files that may have to go, or to stay in a default's place
    kept = remote - content.keys() - {".gitattributes", MANIFEST_FILE}
    replaced = kept if to.mirror else ours_among(kept, api, head, **kind)
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


@contextmanager
def _told_in_a_sentence(endpoint, repo_id):
    """Says in one sentence what went wrong between the client and the Hub, and what is there now."""
    try:
        yield
    except (NO_ANSWER, RuntimeError, LocalEntryNotFoundError, json.JSONDecodeError) as error:
        # the client raises the second and third from what failed the upload or the download of a file
        failure = (
            error.__cause__ if isinstance(error, RuntimeError | LocalEntryNotFoundError) and error.__cause__ else error
        )
        push = f"the push to `{repo_id}`"
        if isinstance(failure, HfHubHTTPError):
            raise _refusal(failure, endpoint, repo_id, push) from error
        if isinstance(failure, json.JSONDecodeError):
            raise ConnectionError(
                f"{endpoint} answered {push} with something else than JSON, perhaps the page of a proxy or a login: "
                "see that `HF_ENDPOINT` is right, and push again."
            ) from error
        reason = _one_line(failure) or type(failure).__name__
        raise ConnectionError(
            f"The connection to {endpoint} broke during {push} ({reason}): the commit is there whole, or not at all. "
            "Push again."
        ) from error
    except ValueError as error:  # of the card, from the client, which gives each fault a line
        if "\n" not in str(error):
            raise
        raise ValueError(
            f"{endpoint} refused the push to `{repo_id}` ({_one_line(error)}): nothing was committed."
        ) from error


def _refusal(error, endpoint, repo_id, push):
    """The error that says what the Hub answered."""
    status = error.response.status_code
    if status in (401, 403):
        return ValueError(
            f"{endpoint} refused to write `{repo_id}` (HTTP {status}): log in by `hf auth login` with a token that may "
            "write there."
        )
    if status == 412:
        return ConnectionError(
            f"Somebody else committed to `{repo_id}` during the push (HTTP 412), so nothing was committed: look at "
            "what is there, and push again."
        )
    told = f"{endpoint} answered {push} with HTTP {status} ({_one_line(error.server_message) or 'without a reason'})"
    if status < 500 and status not in PASSING:
        return ValueError(f"{told}: nothing was committed.")
    return ConnectionError(f"{told}: the commit is there whole, or not at all. Push again later.")


def _one_line(text):
    return " ".join(str(text or "").split())[:300]
