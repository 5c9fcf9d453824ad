"""Which experts the tokens of a conversation go to, and a table of it."""

from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from jinja2 import Environment, StrictUndefined

from llava_mod_hf.model.moe_llava_mod import LlavaModTopKRouter

TEMPLATE = Path(__file__).with_name("experts.html.j2")

PARTS = ("picture", "question", "answer")


@contextmanager
def watching_routers(model):
    """
    Notes what a model's routers choose, as they choose it.

    Args:
        model (`PreTrainedModel`): reads one conversation at a time; of one without routers nothing is noted.

    Yields:
        `dict[int, torch.LongTensor]`: empty; afterwards by layer the experts of each token that was read, best first,
        `(tokens, num_experts_per_tok)`.
    """
    chosen = {layer: [] for layer in getattr(model.config, "moe_layers", [])}
    routers = [module for module in model.modules() if isinstance(module, LlavaModTopKRouter)]

    def note(choices):
        return lambda router, inputs, output: choices.append(output[2])

    hooks = [
        router.register_forward_hook(note(choices)) for router, choices in zip(routers, chosen.values(), strict=True)
    ]
    found: dict[int, torch.Tensor] = {}
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
        found |= {layer: torch.cat(choices).cpu() for layer, choices in chosen.items() if choices}


class TokenExperts(NamedTuple):
    """
    Where a token went.

    Args:
        part (`str`): of [`PARTS`]: what it belongs to. The marks of the template are the question's.
        text (`str`): as it is decoded alone.
        experts (`tuple[tuple[int, ...], ...]`): of each mixture-of-experts layer, best first.
    """

    part: str
    text: str
    experts: tuple


def token_experts(answer):
    """
    Where the tokens of a conversation went: of the prompt, and of the answer but the last, which nobody read again.

    Args:
        answer ([`~llava_mod_hf.talking.answers.Answer`]): through, and with `experts`.

    Returns:
        `list[TokenExperts]`: in their order; none of a model without experts.
    """
    tokens = [*answer.prompt, *answer.tokens]
    picture = answer.processor.tokenizer.convert_tokens_to_ids(answer.processor.image_token)
    layers = [choices.tolist() for choices in answer.experts.values()]
    rows = []
    for place, experts in enumerate(zip(*layers, strict=True)):
        token = tokens[place]
        part = "answer" if place >= len(answer.prompt) else "picture" if token == picture else "question"
        rows.append(TokenExperts(part, answer.processor.decode([token]), tuple(map(tuple, experts))))
    return rows


def shares(rows, num_experts):
    """
    Share of the choices that falls on each expert.

    Args:
        rows (`list[TokenExperts]`), num_experts (`int`).

    Returns:
        `dict[str, list[list[float]]]`: by part and layer, the shares of the experts; without a part that has no token.
    """
    found = {}
    for part in PARTS:
        columns = list(zip(*(row.experts for row in rows if row.part == part), strict=True))
        counts = [Counter(expert for experts in column for expert in experts) for column in columns]
        if counts:
            found[part] = [[count[expert] / count.total() for expert in range(num_experts)] for count in counts]
    return found


def experts_page(answer):
    """
    `str`: HTML of a table of layers and tokens, and of one of shares; empty of a model without experts.

    Args:
        answer: as for [`token_experts`].
    """
    rows = token_experts(answer)
    if not rows:
        return ""
    num_experts = answer.model.config.num_experts
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        layers=list(answer.experts),
        words=[row for row in rows if row.part != "picture"],
        num_experts=num_experts,
        colors=[f"hsl({360 * expert // num_experts} 70% 82%)" for expert in range(num_experts)],
        shares=shares(rows, num_experts),
    )
