"""A Hub that fails while something is read from it, in one sentence."""

import contextlib
import json
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

# the last is the client's own, whose library has another name in other releases
FAILURES = (LocalEntryNotFoundError, HfHubHTTPError, HfHubHTTPError.__bases__[0])

# what is not there, or not for everybody: transformers and datasets say so in a sentence
ANSWERS = (RepositoryNotFoundError, RevisionNotFoundError, RemoteEntryNotFoundError, GatedRepoError)


@contextlib.contextmanager
def told_when_the_hub_fails(name):
    """
    Says in one sentence that the connection dropped, the Hub failed, or a page came in place of a file.

    Args:
        name (`str` or `Path`): what is read; where it is a file or folder, or the Hub is not to be asked
            (`HF_HUB_OFFLINE`), errors stay as they are.

    Raises:
        ConnectionError: naming it.
    """
    try:
        yield
    except Exception as error:
        failure = None if constants.HF_HUB_OFFLINE or Path(name).exists() else _failure(error)
        if failure is None:
            raise
        raise ConnectionError(
            f"`{name}` could not be read from the Hub ({' '.join(str(failure).split())[:300]}): check the connection "
            "and the token, and start again; what has been downloaded is kept."
        ) from error


def _failure(error):
    """What of an error and of its causes is the Hub's, or `None`."""
    found = None
    while error is not None:
        if isinstance(error, ANSWERS):
            return None
        if found is None and isinstance(error, (*FAILURES, json.JSONDecodeError)):
            found = error
        error = error.__cause__ or error.__context__
    return found
