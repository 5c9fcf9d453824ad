"""What several models say to one question, one after the other, with time and experts."""

from typing import NamedTuple

from llava_mod_hf.talking.answers import Answer
from llava_mod_hf.talking.conversation import Conversation
from llava_mod_hf.talking.expert_choices import experts_page


class Said(NamedTuple):
    """
    What a model has said so far.

    Args:
        text (`str`).
        figures (`str`): tokens, seconds and tokens per second, when it is done.
        experts (`str`): HTML of [`~llava_mod_hf.talking.expert_choices.experts_page`], when it is done.
    """

    text: str = ""
    figures: str = ""
    experts: str = ""


def figures_of(answer):
    """`str`: how long an answer is, how long it took, and whether it was cut."""
    count = len(answer.tokens)
    cut = "" if answer.ended else f", cut at {count}"
    return f"{count} tokens in {answer.seconds:.2f} s, {count / answer.seconds:.1f} tokens per second{cut}"


def side_by_side(models, picture, question, sampling):
    """
    Asks models one after the other, so that none waits for another's processor.

    Args:
        models (`list[tuple]`): `(model, processor)` of each.
        picture (`PIL.Image.Image` or `None`), question (`str`): what each is asked.
        sampling ([`~llava_mod_hf.talking.sampling.Sampling`]): of each.

    Yields:
        `list[Said]`: what each has said so far, when a piece has come, and when one is done.

    Raises:
        ValueError: if there is no question, or as [`~llava_mod_hf.talking.conversation.Conversation.read`].
    """
    if not question.strip():
        raise ValueError("There is no question: write one.")
    said = [Said() for _ in models]
    for place, (model, processor) in enumerate(models):
        conversation = Conversation(model, processor)
        if picture is not None:
            conversation.show(picture)
        answer = Answer(conversation, question.strip(), sampling, watch_experts=True)
        for piece in answer:
            said[place] = Said(said[place].text + piece)
            yield list(said)
        said[place] = Said(answer.text, figures_of(answer), experts_page(answer))
        yield list(said)
