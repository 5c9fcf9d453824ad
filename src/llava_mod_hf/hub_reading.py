"""A Hub that fails, refuses, or has not what is read from it, in one sentence."""

import contextlib
import errno
import json
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

# the third is the client's own, whose library has another name in other releases; the last that of `datasets`
FAILURES = (
    LocalEntryNotFoundError, HfHubHTTPError, HfHubHTTPError.__bases__[0], json.JSONDecodeError, ConnectionError,
)  # fmt: skip

# what is not there, or not for everybody
ANSWERS = (RepositoryNotFoundError, RevisionNotFoundError, RemoteEntryNotFoundError)

NOT_HERE = (OfflineModeIsEnabled, LocalEntryNotFoundError)

GATED_DATA = "is a gated dataset on the Hub"  # datasets' own words, which do not tell from what

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class NotRead(OSError):
    """Something is on the Hub, or may be, and was not read: nothing follows about what there is."""


@contextlib.contextmanager
def told_when_the_hub_fails(name):
    """
    Says in one sentence why something could not be read from the Hub, where transformers and datasets do not.

    Args:
        name (`str` or `Path`): what is read; where it is a file or folder, errors stay as they are.

    Raises:
        ConnectionError: naming it, if the connection dropped, the Hub failed, or a page came in place of a file.
        NotRead: naming it, if the disk is full, it is gated, not there, or the Hub is not to be asked.
    """
    try:
        yield
    except Exception as error:
        told = None if Path(name).exists() else _told(name, error, list(_causes(error)))
        if told is None:
            raise
        raise told from error


def _told(name, error, causes):
    """The error that says it, or `None` if it is said."""

    def among(kinds):
        return next((cause for cause in causes if isinstance(cause, kinds)), None)

    if full := next((cause for cause in causes if isinstance(cause, OSError) and cause.errno in FULL), None):
        return NotRead(
            f"`{name}` could not be downloaded ({full.strerror}): make room in `{constants.HF_HOME}`, or set `HF_HOME` "
            "to a folder on another disk, and start again; files that came whole are kept."
        )
    if among(GatedRepoError) or GATED_DATA in str(error):
        return NotRead(
            f"`{name}` is gated: ask for access on its page at {constants.ENDPOINT}, and log in by `hf auth login` "
            "with a token of who asked."
        )
    if constants.HF_HUB_OFFLINE:
        if isinstance(error, ValueError) or not among(NOT_HERE):  # of a part, which names it
            return None
        return NotRead(
            f"`{name}` is no file or folder and has not been downloaded before, and `HF_HUB_OFFLINE` is set: check the "
            "name, or unset it."
        )
    if among(ANSWERS):
        if not ("\n" in str(error).strip() and among(RepositoryNotFoundError)):
            return None
        return NotRead(
            f"`{name}` is no file or folder, and not on the Hub or not for everybody: check the name, and log in by "
            "`hf auth login` if it is private."
        )
    if failure := among(FAILURES):
        return ConnectionError(
            f"`{name}` could not be read from the Hub ({' '.join(str(failure).split())[:300]}): check the connection "
            "and the token, and start again; files that came whole are kept."
        )
    return None


def _causes(error):
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
