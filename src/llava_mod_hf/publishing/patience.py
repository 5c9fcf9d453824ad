"""Requests to the Hub that the client makes once, made again: as often as it makes the others by itself."""

import logging
import re
import time

from huggingface_hub.errors import HfHubHTTPError

# of the client's HTTP library, whichever it is: nobody answered, or not to the end
NO_ANSWER = HfHubHTTPError.__bases__[0]

WAITS = (1, 2, 4, 8, 8)  # seconds, those of the client

PASSING = {408, 429, 500, 502, 503, 504}  # what it tries again, too

# Not among them: where the parts of a push go to (`preupload`, `lfs`). The client has then tried for long already.
ASKED_ONCE = re.compile(
    r"/api/(validate-yaml|repos/create|collections(/[^/]+/[^/]+/items)?|(models|datasets)/[^/]+/[^/]+(/(auth-check|commit|branch|tag|revision)/.+|/refs|/settings)?)$"
)

logger = logging.getLogger(__name__)


def patiently(call, *args, **kwargs):
    """
    What a call returns, which is made again while the Hub drops the connection, is busy or asks to wait.

    Args:
        call (`Callable`): may be made twice: what it asks for is not done again where it has been done.
        args, kwargs: its own.

    Raises:
        Exception: what the call raises, if it will not pass, or has not passed.
    """
    for wait in WAITS:
        try:
            return call(*args, **kwargs)
        except NO_ANSWER as error:
            if not _passes(error):
                raise
            wait = _asked_wait(error) or wait
            logger.warning("%s: trying again in %d s.", " ".join(str(error).split())[:300] or "No answer", wait)
            time.sleep(wait)
    return call(*args, **kwargs)


def _passes(error):
    answered = isinstance(error, HfHubHTTPError)
    if answered and error.response.status_code not in PASSING:
        return False
    try:
        request = error.response.request if answered else error.request
    except RuntimeError:  # of the HTTP library: it never came to one
        return False
    # of a download it tries the second request again, and the first one's refusals
    return ASKED_ONCE.search(request.url.path) is not None or (request.method == "HEAD" and not answered)


def _asked_wait(error):
    """Seconds that an answer asks to wait, or `None`."""
    asked = error.response.headers.get("Retry-After", "") if isinstance(error, HfHubHTTPError) else ""
    return int(asked) + 1 if asked.isdigit() else None
