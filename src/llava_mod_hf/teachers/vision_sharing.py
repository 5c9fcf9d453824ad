"""One run of the vision tower per step, where student and teacher have the same one and neither trains it."""

import copy

import torch
from torch import nn

from llava_mod_hf.fingerprints import content_hash, processor_parts

# of a vision config, what has no influence on the features
VOLATILE = {"_name_or_path", "architectures", "dtype", "model_type", "torch_dtype", "transformers_version"}

DROPOUTS = ("attention_dropout", "dropout", "hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate")


class SharedVisionTower(nn.Module):
    """
    Stands in the teacher for its vision tower: gives the student's last output for the same pixels.

    The student runs first in a step. For any other pixels, or once the output was given away, the student's tower runs
    again: slower, never stale.

    Args:
        tower (`PreTrainedModel`): the student's, frozen; it stays the student's and is no part of this module.
        dtype (`torch.dtype`): of the teacher's own tower, for what follows it.
    """

    def __init__(self, tower, dtype):
        super().__init__()
        self.config, self.dtype = tower.config, dtype
        self._tower, self._seen = (tower,), None  # in a tuple, so that it is not registered here too
        tower.register_forward_hook(self._remember, with_kwargs=True)

    @property
    def source(self):
        """The student's tower."""
        return self._tower[0]

    def _remember(self, module, args, kwargs, output):
        pixels = args[0] if args else kwargs.get("pixel_values")
        options = _options(kwargs)
        if any(torch.is_tensor(value) for value in options.values()) or pixels is None or pixels.is_inference():
            self._seen = None
        else:
            # the pixels themselves are kept, so that no other tensor can take their place in memory; a copy of the
            # output, as the models write into it
            self._seen = pixels, pixels._version, options, copy.copy(output)

    def forward(self, pixel_values, **kwargs):
        (tower,), seen, self._seen = self._tower, self._seen, None
        if any(parameter.requires_grad for parameter in tower.parameters()):
            raise ValueError("The student's vision tower is trained, and the teacher shares it: freeze it, or do not.")
        options = _options(kwargs)
        if seen is not None and seen[2] == options and _same_pixels(seen[0], seen[1], pixel_values):
            output = seen[3]
        else:
            output = copy.copy(tower(pixel_values.to(next(tower.parameters()).device), **kwargs))
            self._seen = None
        for name, value in output.items():
            if value is not None:
                output[name] = self._moved(value, pixel_values.device)
        return output

    def _moved(self, value, device):
        if isinstance(value, tuple):
            return type(value)(self._moved(part, device) for part in value)
        return value.to(device, self.dtype) if torch.is_tensor(value) else value


def _options(kwargs):
    # transformers passes `use_cache` to a model that trains alone, and a tower has no cache
    return {n: value for n, value in kwargs.items() if n not in ("pixel_values", "use_cache") and value is not None}


def _same_pixels(seen, version, pixels):
    if seen._version != version:
        return False
    if seen is pixels:
        return True
    return seen.shape == pixels.shape and seen.dtype == pixels.dtype and torch.equal(seen, pixels.to(seen.device))


def vision_config_hash(tower):
    """A hash of what in a vision tower's config has an influence on its features."""
    return content_hash({name: value for name, value in tower.config.to_dict().items() if name not in VOLATILE})


def share_vision_tower(student, teacher, processor=None, teacher_processor=None):
    """
    A teacher that takes the features of the student's vision tower, where that is the same as its own.

    They are if the towers' configs and weights are equal, bit for bit, both read the same layer and the same pixels,
    and the student's is frozen and has no dropout. Weights that are equal once rounded to the teacher's dtype count as
    equal: the teacher then reads the more precise features.

    Args:
        student, teacher (`PreTrainedModel`): neither is changed.
        processor, teacher_processor (`ProcessorMixin`, *optional*): without them, both read the same pixels.

    Returns:
        `PreTrainedModel`: the teacher itself if they do not share; else a copy that has all of its parts, the very
        same ones, but the tower. The caller's stays whole: what it alone has is freed when the caller lets go of it.
    """
    ours, theirs = (getattr(model.base_model, "vision_tower", None) for model in (student, teacher))
    if ours is None or theirs is None or any(parameter.requires_grad for parameter in ours.parameters()):
        return teacher
    if any(getattr(ours.config, name, 0) for name in DROPOUTS) or any(
        getattr(student.config, name, None) != getattr(teacher.config, name, None)
        for name in ("vision_feature_layer", "vision_feature_select_strategy")
    ):
        return teacher
    if processor is not None and teacher_processor is not None:
        name = "image_processor"
        if processor_parts(processor)[name] != processor_parts(teacher_processor)[name]:
            return teacher
    if vision_config_hash(ours) != vision_config_hash(theirs) or not _same_weights(ours, theirs):
        return teacher
    return _with_tower(teacher, SharedVisionTower(ours, theirs.dtype))


def _with_tower(teacher, tower):
    base = _shallow_copy(teacher.base_model)
    base.vision_tower = tower
    if teacher.base_model is teacher:
        return base
    copied = _shallow_copy(teacher)
    setattr(copied, teacher.base_model_prefix, base)
    return copied


def _shallow_copy(module):
    """Another module of the same parts: to give it another part does not change the first."""
    copied = copy.copy(module)
    copied._modules = module._modules.copy()
    return copied


def _same_weights(ours, theirs):
    weights, others = ours.state_dict(), theirs.state_dict()
    return weights.keys() == others.keys() and all(
        weights[name].shape == other.shape and torch.equal(weights[name].to(other.device, other.dtype), other)
        for name, other in others.items()
    )
