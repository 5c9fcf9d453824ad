"""Where a push goes: a repository, its branch and its tag, opened before anything is sent."""

import dataclasses
import json
import re
from contextlib import contextmanager
from dataclasses import dataclass, field

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from llava_mod_hf.publishing.manifest import ADAPTER_CONFIG, CONFIG, RemoteFiles
from llava_mod_hf.publishing.patience import NO_ANSWER, PASSING, patiently

GATES = ("auto", "manual")

NAME_OF_REF = re.compile(r"(?!.*(\.\.|//|\.lock$|/$))\w[\w./-]*")


@dataclass(frozen=True)
class Destination:
    """
    Where a push goes.

    Args:
        repo_id (`str`), repo_type (`str`, *optional*, defaults to `"model"`): as the Hub names it.
        private (`bool`, *optional*, defaults to `False`): create the repository private; one that is public is refused.
        revision (`str`, *optional*, defaults to `"main"`): branch to commit to, begun from `main` if missing.
        mirror (`bool`, *optional*, defaults to `False`):
            Make the repository equal to what is pushed: delete every other file, whosever it is, `.gitattributes`
            apart.
        tag (`str`, *optional*): name for the commit, which stays when others follow.
        gated (`str`, *optional*): `"auto"` or `"manual"`: who downloads has to ask, and is let in at once or by you.
            Set before the first file is there; by default left as it is.
        token (`str`, *optional*): by default that of the machine.

    Raises:
        ValueError: if one of them is none, or tag and branch have one name.
    """

    repo_id: str
    repo_type: str = "model"
    private: bool = False
    revision: str | None = None
    mirror: bool = False
    tag: str | None = None
    gated: str | None = None
    token: str | None = field(default=None, repr=False)

    def __post_init__(self):
        check_names(revision=self.revision, tag=self.tag, gated=self.gated)

    def opened(self, api):
        """
        Makes repository and branch if they are missing, and finds out what would be refused after hours.

        Args:
            api ([`~huggingface_hub.HfApi`]): the client.

        Returns:
            `tuple`: the destination by its whole name, and the commit that a push goes on from (`str`).

        Raises:
            ValueError: if it is public and should be private, or has the tag already, of an earlier commit.
        """
        kind = {"repo_type": self.repo_type}
        created = patiently(api.create_repo, self.repo_id, private=self.private, exist_ok=True, **kind)
        to = dataclasses.replace(self, repo_id=created.repo_id)
        patiently(api.auth_check, to.repo_id, write=True, **kind)
        if to.private and not patiently(api.repo_info, to.repo_id, **kind).private:
            raise ValueError(
                f"`private=True` was given, but `{to.repo_id}` exists and is public: make it private first."
            )
        if to.gated is not None:
            patiently(api.update_repo_settings, to.repo_id, gated=to.gated, **kind)
        if to.revision is not None and not patiently(api.revision_exists, to.repo_id, to.revision, **kind):
            patiently(api.create_branch, to.repo_id, branch=to.revision, exist_ok=True, **kind)
        parent = patiently(api.repo_info, to.repo_id, revision=to.revision, **kind).sha
        if to.tag is not None:
            to.check_tag(api, parent)
        return to, parent

    def check_tag(self, api, commit):
        """
        Raises:
            ValueError: if there is a tag of this name, of another commit; of any where `commit` is `None`.
        """
        refs = patiently(api.list_repo_refs, self.repo_id, repo_type=self.repo_type)
        tagged = {ref.name: ref.target_commit for ref in refs.tags}.get(self.tag, commit)
        if tagged != commit:
            raise ValueError(
                f"`{self.repo_id}` has a tag `{self.tag}` of another commit, {tagged[:8]}: give another name, or "
                "delete the tag there."
            )

    def set_tag(self, api, commit):
        """Names a commit; raises as [`check_tag`], the commit being there."""
        kind = {"repo_type": self.repo_type}
        patiently(api.create_tag, self.repo_id, tag=self.tag, revision=commit, exist_ok=True, **kind)
        self.check_tag(api, commit)


def check_names(*, revision=None, tag=None, gated=None):
    """
    Raises:
        ValueError: if tag or branch have no name that git allows, both have one, or `gated` is no way to be let in.
    """
    for role, name in (("branch", revision), ("tag", tag)):
        if name is not None and not NAME_OF_REF.fullmatch(name):
            raise ValueError(
                f"`{name}` is no name of a {role}: give letters, digits, `.`, `-`, `_` and `/`, a letter or a digit "
                "first."
            )
    if tag is not None and tag == (revision or "main"):
        raise ValueError(f"`{tag}` is given as tag and as branch, and nobody could tell them apart: give two names.")
    if gated is not None and gated not in GATES:
        raise ValueError(f"`gated` is {gated!r}: give one of {', '.join(GATES)}, or leave it out.")


def open_destination(to, model_type=None):
    """
    Makes a repository ready for a run's pushes, before the run.

    Args:
        to ([`Destination`]): where they go.
        model_type (`str`, *optional*): of the model's config; an adapter has none.

    Returns:
        `str`: its whole name.

    Raises:
        ValueError: if the Hub refuses the token or a name, or the repository has the tag, holds another model, or is
            public and should be private.
        ConnectionError: if the Hub fails or does not answer.
    """
    api = HfApi(token=to.token)
    with told_in_a_sentence(api.endpoint, to.repo_id):
        opened, commit = to.opened(api)
        if to.tag is not None:
            opened.check_tag(api, None)
        head = patiently(api.repo_info, opened.repo_id, revision=commit, files_metadata=True, repo_type=to.repo_type)
        config = {ADAPTER_CONFIG: b"{}"} if model_type is None else {CONFIG: json.dumps({"model_type": model_type})}
        RemoteFiles(api, head, to.repo_type).check_same_model(config)
        return opened.repo_id


@contextmanager
def told_in_a_sentence(endpoint, repo_id):
    """Says in one sentence what went wrong between the client and the Hub, and what is there now."""
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise ConnectionError(
            f"`HF_HUB_OFFLINE` is set, so that `{repo_id}` cannot be pushed to: unset it, and push again."
        ) from error
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
            "write there, or give a name of your own."
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
