"""What the Hub would refuse of a card, and what a reader would miss: without a network, before anything is sent."""

import math
import re

import yaml
from huggingface_hub import ModelCard
from huggingface_hub.utils import HFValidationError, validate_repo_id

CARD_FILE = "README.md"

RELATIONS = ("adapter", "finetune", "merge", "quantized")

LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")

PICTURE = re.compile(r"!\[[^\]]*\]\(([^)\s]+)\)")

# what a template leaves behind that was not filled in
UNFILLED = re.compile(r"\{\{.*?\}\}|\{%.*?%\}")

IDS = ("base_model", "teacher_model", "datasets")


def check_card(text, name, *, folder=None):
    """
    Refuses a card whose metadata the Hub would refuse or not understand. The Hub's own check (`ModelCard.validate`) is
    made when it is pushed.

    Args:
        text (`str`): of the card, metadata included.
        name (`str`): of the file, for messages.
        folder (`Path`, *optional*): of the repository, whose pictures it shows.

    Raises:
        ValueError: if its metadata are no YAML mapping, an id is none of the Hub's, licence, relation or results are
            not as the Hub has them, a part of a template is left, or a picture is not there.
    """
    data = _metadata(text, name)
    for key in IDS:
        given = data.get(key) or []
        for value in given if isinstance(given, list) else [given]:
            try:
                validate_repo_id(value)
            except HFValidationError as error:
                raise ValueError(f"`{name}` has the `{key}` {value!r}, which is no id of the Hub: mend it.") from error
    licenses = data.get("license") or []
    for value in licenses if isinstance(licenses, list) else [licenses]:
        if not (isinstance(value, str) and LICENSE.fullmatch(value)):
            raise ValueError(
                f"`{name}` has the licence {value!r}: give the Hub's id of one, such as `apache-2.0`, or `other`."
            )
    relation = data.get("base_model_relation")
    if relation is not None and relation not in RELATIONS:
        raise ValueError(f"`{name}` has the `base_model_relation` {relation!r}: give one of {', '.join(RELATIONS)}.")
    body = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    prose = re.sub(r"(`{3,}).*?\n\1", "", body, flags=re.DOTALL)  # code may have such signs of its own
    if left := UNFILLED.search(prose):
        raise ValueError(f"`{name}` has `{left[0]}`, a part of a template that nobody filled in.")
    for picture in PICTURE.findall(prose):
        if folder is not None and "://" not in picture and not (folder / picture).is_file():
            raise ValueError(f"`{name}` shows `{picture}`, which is not there: bring it, or take it out.")


def _metadata(text, name):
    """The card's metadata as a `dict`, its results read as the Hub's client reads them."""
    try:
        data = ModelCard(text).data
    except yaml.YAMLError as error:
        raise ValueError(f"The metadata of `{name}` are not valid YAML: {' '.join(str(error).split())}.") from error
    except ValueError as error:  # of the client, which may take a page for it
        raise ValueError(f"The metadata of `{name}` cannot be read ({' '.join(str(error).split())[:300]}).") from error
    for result in data.eval_results or []:
        value = result.metric_value
        if not (isinstance(value, int | float) and math.isfinite(value)):
            raise ValueError(f"`{name}` has the result `{result.metric_type}: {value}`, which is no finite number.")
    return data.to_dict()
