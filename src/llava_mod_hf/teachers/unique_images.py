"""Pictures that are the same are encoded once in a batch."""

import torch
from peft import PeftModel
from torch import nn
from transformers import LlavaModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from llava_mod_hf.teachers.vision_sharing import DROPOUTS

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of a number


def encode_once(model):
    """
    Lets a model's vision encoder run on each picture of a batch once, however often the batch has it.

    Args:
        model (`PreTrainedModel` or `PeftModel`): a LLaVA; any other is left as it is.

    Returns:
        [`UniqueImages`] or `None`: what stands for the encoder.
    """
    base_model = (model.get_base_model() if isinstance(model, PeftModel) else model).base_model
    if not isinstance(base_model, LlavaModel):
        return None
    # those of a copy that shares its parts are its own: the hooks are the very same
    hooks = [getattr(hook, "__self__", None) for hook in base_model._forward_pre_hooks.values()]
    return next((each for each in hooks if isinstance(each, UniqueImages)), None) or UniqueImages(base_model)


def keep_features(cache, *models):
    """
    Gives models a cache of their encoders' features, or takes it from them.

    Args:
        cache ([`~llava_mod_hf.teachers.vision_cache.VisionCache`] or `None`).
        models (`PreTrainedModel` or `PeftModel`): any but a LLaVA is left as it is.
    """
    for model in models:
        images = encode_once(model)
        if images is not None:
            images.cache = cache


class UniqueImages(nn.Module):
    """
    Stands for the vision encoder of a LLaVA while that runs: hands it the pictures of the batch that differ, and its
    features to all that are the same. With an encoder that draws dropout, every picture is its own.

    Args:
        base_model (`LlavaModel`).

    Attributes:
        cache ([`~llava_mod_hf.teachers.vision_cache.VisionCache`] or `None`): that is asked before the encoder.
    """

    def __init__(self, base_model):
        super().__init__()
        self._tower, self._layers, self.cache = (), (), None
        base_model.register_forward_pre_hook(self._begin, with_kwargs=True)
        base_model.register_forward_hook(self._end, always_call=True)

    def _begin(self, module, args, kwargs):
        pixels, tower = kwargs.get("pixel_values"), module.vision_tower
        if isinstance(tower, UniqueImages) or pixels is None or kwargs.get("image_sizes") is not None:
            return
        if tower.training and any(getattr(tower.config, name, 0) for name in DROPOUTS):
            return
        layers = kwargs.get("vision_feature_layer")
        layers = module.config.vision_feature_layer if layers is None else layers
        self._layers = (layers,) if isinstance(layers, int) else tuple(layers)
        self._tower = (tower,)  # in a tuple, so that it is no part of this module
        module.vision_tower = self

    def _end(self, module, args, output):
        if self._tower:
            (module.vision_tower,), self._tower = self._tower, ()

    def forward(self, pixel_values, **kwargs):
        """Only the layers of which a LLaVA takes its features are given, and nothing else."""
        (tower,) = self._tower
        if self.cache is not None:
            kept = self.cache.features(tower, pixel_values, self._layers, **kwargs)
            if kept is not None:
                return BaseModelOutputWithPooling(hidden_states=kept)
        rows, places = different_rows(pixel_values)
        if len(rows) == len(places):
            return tower(pixel_values, **kwargs)
        found = tower(pixel_values[rows], **kwargs).hidden_states
        return BaseModelOutputWithPooling(hidden_states={layer: found[layer][places] for layer in self._layers})


def different_rows(tensor):
    """
    Which rows of a tensor differ, bit for bit.

    Args:
        tensor (`torch.Tensor` of shape `(rows, …)`).

    Returns:
        `tuple[list[int], list[int]]`: the first row of each kind, and for every row which of these it is.
    """
    if len(tensor) < 2:
        return [*range(len(tensor))], [*range(len(tensor))]
    bits = tensor.detach().flatten(1).contiguous().view(BITS[tensor.itemsize])
    factors = 2 * torch.arange(bits.shape[1], device=bits.device) + 1
    sums = torch.stack([(row * factors).sum() for row in bits]).tolist()  # as a hash, on whichever device
    rows, places, seen = [], [], {}
    for index, value in enumerate(sums):
        same = next((kind for kind in seen.get(value, ()) if torch.equal(bits[rows[kind]], bits[index])), None)
        if same is None:
            same = len(rows)
            rows.append(index)
            seen.setdefault(value, []).append(same)
        places.append(same)
    return rows, places
