"""Which files of a repository are ours: a list in the repository itself, so that nobody else's are deleted."""

import functools
import hashlib
import json
from pathlib import Path

from huggingface_hub import CommitOperationAdd

MANIFEST_FILE = ".llava_mod_files.json"

MODEL_CONFIGS = CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"


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


class RemoteFiles:
    """
    The files of a repository at a commit, and which of them are ours.

    Args:
        api ([`~huggingface_hub.HfApi`]): the client.
        head ([`~huggingface_hub.ModelInfo`] or [`~huggingface_hub.DatasetInfo`]): with the metadata of files.
        repo_type (`str`): the repository's.

    Attributes:
        names (`set[str]`).
    """

    def __init__(self, api, head, repo_type):
        self._api, self._head, self._repo_type = api, head, repo_type
        self._lfs = {sibling.rfilename: sibling.lfs for sibling in head.siblings}
        self.names = set(self._lfs)

    def content(self, name):
        """`bytes`: of a file."""
        path = self._api.hf_hub_download(self._head.id, name, revision=self._head.sha, repo_type=self._repo_type)
        return Path(path).read_bytes()

    @functools.cached_property
    def listed(self):
        """`dict[str, str]`: what an earlier push of ours brought, and its SHA-256; empty without a list of ours."""
        if MANIFEST_FILE not in self.names:
            return {}
        try:
            return {name: str(sha256) for name, sha256 in json.loads(self.content(MANIFEST_FILE))["sha256"].items()}
        except (
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
        ):  # somebody edited it: then nothing is known to be ours
            return {}

    def ours_among(self, names):
        """`set[str]`: those of some names that an earlier push of ours brought, and nobody changed since."""
        return (
            {name for name in names & self.listed.keys() if self.listed[name] == self._sha256(name)} if names else set()
        )

    def _sha256(self, name):
        lfs = self._lfs[name]
        return lfs.sha256 if lfs else hashlib.sha256(self.content(name)).hexdigest()

    def check_same_model(self, configs):
        """
        Refuses to lay a model's files among those of another, which would be neither.

        Args:
            configs (`dict[str, bytes]`): of [`MODEL_CONFIGS`], those of the model that is brought.

        Raises:
            ValueError: if a config that no push of ours brought is of another type, or of what is not brought.
        """
        for name in MODEL_CONFIGS:
            if name not in self.names or name in self.listed:
                continue
            theirs = _model_type(self.content(name))
            if name not in configs or _model_type(configs[name]) != theirs:
                raise ValueError(
                    f"`{self._head.id}` holds another model by {name}{f' (`{theirs}`)' if theirs else ''}, which no "
                    "push of this package brought: give another name or branch, or `mirror` to replace all of it."
                )


def _model_type(config):
    try:
        return json.loads(config).get("model_type")
    except (ValueError, AttributeError):
        return None
