"""The collection that the students of a family stand in, stage after stage."""

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from llava_mod_hf.publishing.patience import NO_ANSWER, PASSING, patiently


def add_to_collection(repo_id, title, *, private=False, note=None):
    """
    Puts a model into a collection of its owner's, which is made if there is none of that title.

    Args:
        repo_id (`str`): of the model, which is pushed.
        title (`str`): of the collection.
        private (`bool`, *optional*, defaults to `False`): whether a new collection is.
        note (`str`, *optional*): what stands beside the model there; one that is there already keeps its own.

    Returns:
        `str`: the collection's address.

    Raises:
        ValueError: if the Hub refuses; the model stays pushed.
        ConnectionError: if the Hub fails or does not answer.
    """
    api, owner = HfApi(), repo_id.partition("/")[0]
    try:
        found = patiently(api.create_collection, title, namespace=owner, private=private, exists_ok=True)
        patiently(api.add_collection_item, found.slug, repo_id, "model", note=note, exists_ok=True)
    except NO_ANSWER as error:
        answered = isinstance(error, HfHubHTTPError)
        refused = answered and error.response.status_code < 500 and error.response.status_code not in PASSING
        reason = " ".join(str((error.server_message if answered else None) or error).split())[:300]
        raise (ValueError if refused else ConnectionError)(
            f"`{repo_id}` is pushed, and could not be put into the collection `{title}` of `{owner}` ({reason}): "
            f"{'give another title, or a token that may write there' if refused else 'publish again'}."
        ) from error
    return found.url
