"""The last FFN of a language model, at the positions whose output somebody reads."""

import weakref

import torch

_KNOWN: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # base model → its `LastFfn`


def read_only(base_model, rows):
    """
    Says what is read of a base model's next forward pass, so that its last FFN runs there alone.

    Args:
        base_model (`PreTrainedModel`): as for [`LastFfn`].
        rows (`torch.BoolTensor` of shape `(batch, sequence)`): positions whose last hidden state is read.
    """
    if base_model not in _KNOWN:
        _KNOWN[base_model] = LastFfn(base_model)
    _KNOWN[base_model].reads(rows)


class LastFfn:
    """
    Runs the FFN of a language model's last layer at the positions that are read: those of an image and of a prompt feed
    nothing after it. Elsewhere its output is 0.

    The hooks stay, since gradient checkpointing runs the layer again in the backward pass; what is not asked for by
    [`read_only`] runs whole.

    Args:
        base_model (`PreTrainedModel`): with `language_model.layers`; anything else is left as it is, as is a mixture of
            experts, whose router is balanced over all positions.
    """

    def __init__(self, base_model):
        self._next = self._rows = None
        layers = getattr(getattr(base_model, "language_model", None), "layers", None)
        ffn = getattr(layers[-1], "mlp", None) if layers else None
        if ffn is not None and not hasattr(ffn, "experts"):
            base_model.register_forward_pre_hook(self._begin)
            ffn.register_forward_pre_hook(self._take)
            ffn.register_forward_hook(self._give)

    def reads(self, rows):
        """As [`read_only`]: of the next forward pass, and of that alone."""
        self._next = rows

    def _begin(self, module, args):
        self._rows, self._next = self._next, None

    def _take(self, module, args):
        if self._rows is None:
            return None
        (hidden_states,) = args
        self._rows = self._rows.to(hidden_states.device)
        return (hidden_states[self._rows][None],)

    def _give(self, module, args, output):
        if self._rows is None:
            return None
        everywhere = torch.zeros(*self._rows.shape, output.shape[-1], dtype=output.dtype, device=output.device)
        return everywhere.masked_scatter(self._rows[..., None], output)
