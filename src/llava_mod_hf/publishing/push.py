"""From a folder to one commit on the Hub."""

from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError

from llava_mod_hf.publishing.repository import _files, check_publishable


def push_checkpoint(folder, repo_id, *, private=False, revision=None):
    """
    Makes a Hub repository equal to a folder, everything or nothing, in one commit.

    The repository and the branch are created if missing, and stay, without the files, if the upload then fails. Files
    of the repository that the folder does not have are deleted in the same commit, `.gitattributes` apart. The commit
    is refused by the Hub if somebody else committed in between. Without any difference there is no commit.

    Args:
        folder (`str` or `Path`): What [`check_publishable`] accepts.
        repo_id (`str`): `"owner/name"`, or `"name"` for the token's owner.
        private (`bool`, *optional*, defaults to `False`): Create the repository private.
        revision (`str`, *optional*, defaults to `"main"`): Branch to commit to.

    Returns:
        [`~huggingface_hub.CommitInfo`].

    Raises:
        ValueError: if the folder is refused, if the Hub refuses the token, or if `private` is asked for a repository
            that is public.
        HfHubHTTPError or RuntimeError: if the Hub or the upload of a file fails; then there is no commit.
    """
    files = check_publishable(folder)
    return _push(Path(folder), files, repo_id, "Upload LLaVA-MoD student", private=private, revision=revision)


def push_dataset(folder, repo_id, *, private=False, revision=None):
    """
    Makes a data set of the Hub equal to a folder of Parquet files and its card, as [`push_checkpoint`] does a model.

    Raises:
        ValueError: if the folder has no Parquet files or no card, or something else than them and a YAML file.
    """
    folder = Path(folder)
    files = [path for path in _files(folder) if not path.name.startswith(".")]
    strange = [path for path in files if path.suffix not in (".parquet", ".yaml") and path.name != "README.md"]
    if strange or not {".parquet", ".md"} <= {path.suffix for path in files}:
        raise ValueError(
            f"`{folder}` is not a data set to publish: it needs Parquet files and a README.md, and "
            f"{f'has `{strange[0]}` too' if strange else 'lacks some of them'}."
        )
    return _push(folder, files, repo_id, "Upload data set", repo_type="dataset", private=private, revision=revision)


def _push(folder, files, repo_id, message, *, repo_type="model", private=False, revision=None):
    """One commit that makes a repository hold these files of a folder and no others."""
    api = HfApi()
    kind = {"repo_type": repo_type}
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True, **kind).repo_id
        if private and not api.repo_info(repo_id, **kind).private:
            raise ValueError(f"`private=True` was given, but `{repo_id}` exists and is public: make it private first.")
        if revision is not None and not api.revision_exists(repo_id, revision, **kind):
            api.create_branch(repo_id, branch=revision, **kind)
        head = api.repo_info(repo_id, revision=revision, **kind)
        remote = {sibling.rfilename for sibling in head.siblings}
        if ".gitignore" in remote:
            raise ValueError(f"`{repo_id}` has a .gitignore, for which the Hub would skip files: delete it there.")
        local = {path.relative_to(folder).as_posix(): path for path in files}
        operations = [CommitOperationAdd(name, path) for name, path in local.items()]
        operations += [CommitOperationDelete(name) for name in sorted(remote - local.keys() - {".gitattributes"})]
        return api.create_commit(
            repo_id, operations, commit_message=message, revision=revision, parent_commit=head.sha, **kind
        )
    except HfHubHTTPError as error:
        if error.response.status_code not in (401, 403):
            raise
        raise ValueError(
            f"{api.endpoint} refused to write `{repo_id}` (HTTP {error.response.status_code}): log in by `hf auth "
            "login` with a token that may write there."
        ) from error
