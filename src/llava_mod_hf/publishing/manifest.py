"""Which files of a repository are ours: a list in the repository itself, so that nobody else's are deleted."""

import hashlib
import json
from pathlib import Path

from huggingface_hub import CommitOperationAdd

MANIFEST_FILE = ".llava_mod_files.json"


def manifest_of(additions):
    """
    The list of what a push brings, as one more file of it.

    Args:
        additions (`list[CommitOperationAdd]`): the files.

    Returns:
        [`~huggingface_hub.CommitOperationAdd`].
    """
    hashes = {item.path_in_repo: item.upload_info.sha256.hex() for item in additions}
    text = json.dumps({"sha256": dict(sorted(hashes.items()))}, indent=1) + "\n"
    return CommitOperationAdd(MANIFEST_FILE, text.encode())


def ours_among(paths, api, head, **repo_type):
    """
    Those files of a repository that an earlier push of ours brought, and nobody changed since.

    Args:
        paths (`set[str]`): of files of the repository.
        api ([`~huggingface_hub.HfApi`]): the client.
        head ([`~huggingface_hub.ModelInfo`] or [`~huggingface_hub.DatasetInfo`]): with the metadata of files.
        repo_type (`str`): the repository's.

    Returns:
        `set[str]`: empty without a list, or with one that is not ours.
    """

    def content(path):
        return Path(api.hf_hub_download(head.id, path, revision=head.sha, **repo_type)).read_bytes()

    lfs = {sibling.rfilename: sibling.lfs for sibling in head.siblings}
    if not paths or MANIFEST_FILE not in lfs:
        return set()
    try:
        listed = {path: str(sha256) for path, sha256 in json.loads(content(MANIFEST_FILE))["sha256"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):  # somebody edited it: then nothing is known to be ours
        return set()
    return {
        path
        for path in paths & listed.keys()
        if listed[path] == (lfs[path].sha256 if lfs[path] else hashlib.sha256(content(path)).hexdigest())
    }
