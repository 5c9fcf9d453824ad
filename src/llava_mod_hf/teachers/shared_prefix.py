"""Both responses of a pair in one sequence, so that its images and its prompt are computed once."""

import functools
import logging
from typing import NamedTuple

import torch
from transformers import LlavaModel

from llava_mod_hf.teachers.last_ffn import read_only

logger = logging.getLogger(__name__)

MASKED = ("sdpa", "eager")  # attention implementations that take any mask

POSITIONAL = {"full_attention", "sliding_attention"}  # layers that know the order by positions and mask alone


class PackedPairs(NamedTuple):
    """
    Pairs as one row each: prompt, chosen response, rejected response, padding.

    Args:
        input_ids, position_ids (`torch.LongTensor` of shape `(pairs, packed)`):
            Positions of the rejected response go on from the prompt, as in a row of its own.
        may_attend (`torch.BoolTensor` of shape `(pairs, 1, packed, packed)`):
            Causal, and blind to the other response.
        tokens (`torch.LongTensor` of shape `(2 * pairs, length)`): where each token of the rows lies, flat; padding
            anywhere.
        predictors (`torch.LongTensor` of shape `(2 * pairs, response)`): where the tokens lie that predict each
            response, flat.
        labels (`torch.LongTensor` of shape `(2 * pairs, response)`): those responses, −100 behind their ends.
        order (`torch.LongTensor` of shape `(2 * pairs, length - 1)`): for each token of a row but the last, which of
            its response's tokens it predicts.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    may_attend: torch.Tensor
    tokens: torch.Tensor
    predictors: torch.Tensor
    labels: torch.Tensor
    order: torch.Tensor


def pack_pairs(input_ids, attention_mask, completion_mask):
    """
    Puts the rows of a batch of pairs together, two by two.

    Args:
        input_ids, attention_mask, completion_mask (`torch.Tensor` of shape `(2 * pairs, length)`):
            The chosen rows, then the rejected ones; a row is prompt, response, padding.

    Returns:
        [`PackedPairs`] or `None`: `None` if the rows are otherwise, or the prompts of a pair differ.
    """
    device, (rows, length) = input_ids.device, input_ids.shape
    columns = torch.arange(length, device=device)
    ends, responses = attention_mask.sum(1), completion_mask.sum(1)
    starts = ends - responses
    in_prompt = columns < starts[:, None]
    in_response = ~in_prompt & (columns < ends[:, None])
    halves = [each.chunk(2) for each in (input_ids, starts, in_prompt)] if rows % 2 == 0 else []
    if (
        not halves
        or not torch.equal(halves[1][0], halves[1][1])
        or not (starts > 0).all()
        or not torch.equal(in_prompt | in_response, attention_mask.bool())
        or not torch.equal(in_response, completion_mask.bool())
        or not ((halves[0][0] == halves[0][1]) | ~halves[2][0]).all()
    ):
        return None

    pairs, prompt = rows // 2, starts[: rows // 2, None]  # (pairs, 1)
    chosen, rejected = (each[:, None] for each in responses.chunk(2))
    packed = int((prompt + chosen + rejected).max())
    places = torch.arange(packed, device=device).expand(pairs, packed)
    is_rejected, is_token = places >= prompt + chosen, places < prompt + chosen + rejected
    row = torch.arange(pairs, device=device)[:, None]
    column = (places - chosen * is_rejected).clamp(max=length - 1)
    # padding repeats the end of a response, which is no image
    ids = input_ids[row + pairs * is_rejected, column].where(is_token, input_ids[0, ends[0] - 1])

    segments = (places >= prompt).long() + is_rejected
    seen = (segments[:, None, :] == 0) | (segments[:, None, :] == segments[:, :, None])
    causal = places[:, None, :] <= places[:, :, None]
    may_attend = (seen & causal & is_token[:, None, :])[:, None]

    moved = torch.cat([torch.zeros_like(chosen), chosen]) * (columns >= starts[:, None])
    tokens = (columns + moved).clamp(max=packed - 1) + packed * torch.cat([row, row])
    steps = torch.arange(int(responses.max()), device=device)
    predictors = tokens.gather(1, (starts[:, None] - 1 + steps).clamp(max=length - 1))
    # the first token of a rejected response is predicted by the end of the prompt, as that of a chosen one
    labels = input_ids.gather(1, (starts[:, None] + steps).clamp(max=length - 1))
    labels = labels.masked_fill(steps >= responses[:, None], -100)
    order = columns[:-1] - (starts[:, None] - 1)
    return PackedPairs(ids, column, may_attend, tokens, predictors, labels, order)


def cannot_share(model):
    """
    Why a model cannot read both responses of a pair in one sequence.

    Args:
        model (`PreTrainedModel`).

    Returns:
        `str` or `None`: what stands against it.
    """
    text_config = model.config.get_text_config()
    implementation = text_config._attn_implementation
    if not isinstance(model.base_model, LlavaModel):
        return f"{type(model).__name__} is no LLaVA"
    if implementation not in MASKED:
        return f"`{implementation}` attention takes no mask of its own kind: {' and '.join(MASKED)} do"
    others = {*(getattr(text_config, "layer_types", None) or ())} - POSITIONAL
    if others:
        return f"its language model has layers of {', '.join(sorted(others))}"
    return None


def sharing(model, unwrapped):
    """
    A model as a trainer of pairs calls it: by [`SharedPrefix`] if it can, and if not, that is said once.

    Args:
        model (`PreTrainedModel`): maybe wrapped.
        unwrapped (`PreTrainedModel`): the same, not wrapped.

    Returns:
        [`SharedPrefix`], or `model`.
    """
    reason = cannot_share(unwrapped)
    if reason is None:
        return SharedPrefix(model, unwrapped)
    _say(f"`share_prefix`: {reason}, so the prompt of a pair is computed for each of its responses.")
    return model


@functools.cache
def _say(sentence):
    logger.warning(sentence)


def _window(text_config):
    """Tokens that a layer looks back, of the layers with the shortest look; `None` if all see everything."""
    types = getattr(text_config, "layer_types", None)
    slides = "sliding_attention" in types if types else True
    return getattr(text_config, "sliding_window", None) if slides else None


class SharedPrefix:
    """
    What a trainer of pairs calls as its model, which TRL has given a fused head: the same log-probabilities and
    gradients, from one sequence of prompt, chosen and rejected response per pair (Hydra in arXiv 2410.20305 shares the
    prompt so). The head reads the tokens that predict a response, and no others.

    Rows that it cannot put together, and those longer than a sliding window, go to the model as they are.

    Args:
        model (`PreTrainedModel`): maybe wrapped.
        unwrapped (`PreTrainedModel`): the same, not wrapped, of which [`cannot_share`] says nothing.
    """

    def __init__(self, model, unwrapped):
        self.model, self.base_model = model, unwrapped.base_model
        text_config = unwrapped.config.get_text_config()
        self.additive = text_config._attn_implementation == "eager"
        self.window = _window(text_config)

    def __call__(self, input_ids, attention_mask, labels=None, pixel_values=None, fused_lm_head=False, **kwargs):
        """
        Arguments and outputs are those of the model; `log_probs` and its like have the rows' own shape.
        """
        images = None if pixel_values is None else pixel_values.chunk(2)
        known = kwargs.keys() <= {"use_cache", "output_router_logits"}
        short = self.window is None or input_ids.shape[1] <= self.window
        same = images is None or (len(images) == 2 and torch.equal(*images))
        pairs = None
        if fused_lm_head and known and short and same:
            pairs = pack_pairs(input_ids, attention_mask, labels != -100)
        if pairs is None:
            inputs = {} if pixel_values is None else {"pixel_values": pixel_values}
            inputs |= {} if labels is None else {"labels": labels}
            inputs |= {"fused_lm_head": True} if fused_lm_head else {}
            return self.model(input_ids=input_ids, attention_mask=attention_mask, **inputs, **kwargs)
        before = self.base_model.register_forward_pre_hook(self._with_mask(pairs), with_kwargs=True)
        # first, so that what others note on the way is of the rows' own shape
        after = self.base_model.register_forward_hook(_with_rows(pairs), prepend=True)
        read = torch.zeros_like(pairs.input_ids, dtype=torch.bool).flatten()
        read[pairs.predictors[pairs.labels != -100]] = True
        read_only(self.base_model, read.view_as(pairs.input_ids))
        try:
            outputs = self.model(
                input_ids=pairs.input_ids,
                position_ids=pairs.position_ids,
                attention_mask=attention_mask,  # of the rows, by which the router's loss is averaged
                shift_labels=pairs.labels,
                fused_lm_head=True,
                **({} if images is None else {"pixel_values": images[0]}),
                **kwargs,
            )
        finally:
            before.remove()
            after.remove()
        supervised = (pairs.order >= 0) & (pairs.order < (pairs.labels != -100).sum(1, keepdim=True))
        order = pairs.order.clamp(0, pairs.labels.shape[1] - 1)
        for name in ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask"):
            if outputs.get(name) is not None:
                setattr(outputs, name, outputs[name].gather(1, order).masked_fill(~supervised, 0))
        return outputs

    def _with_mask(self, pairs):
        def give(module, args, kwargs):
            mask = pairs.may_attend
            if self.additive:
                dtype = next(module.parameters()).dtype
                mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
            return args, {**kwargs, "attention_mask": mask}

        return give


def _with_rows(pairs):
    """A hook by which the head gets the tokens that predict responses, and the router's losses every row's tokens."""

    def take(module, args, outputs):
        hidden_states = outputs.last_hidden_state
        outputs["last_hidden_state"] = hidden_states.flatten(0, 1)[pairs.predictors]
        if outputs.get("router_logits") is not None:
            outputs["router_logits"] = tuple(logits[pairs.tokens.flatten()] for logits in outputs["router_logits"])
        return outputs

    return take
