"""What TRL's trainers call as their model, so that the router's losses are those of the student's config."""

from llava_mod_hf.model.moe_llava_mod import router_losses


class NotedModel:
    """
    What the parent calls as its model: notes the log-probabilities, and puts the router loss that the student's config
    names in place of transformers', which is computed from the logits that the router left on its way.

    Args:
        model (`PreTrainedModel`): which TRL has given a fused head, maybe wrapped.
        base_model (`PreTrainedModel`): its part that returns the router's logits.
        text_config (`PreTrainedConfig`): the student's.

    Attributes:
        log_probs (`torch.FloatTensor`): of the last call.
        z_loss (`torch.FloatTensor` or `None`): of the last call, if the config has a coefficient for it.
        router (`tuple` or `None`): the routers' logits of the last call, if it asked for them, and its token ids,
            attention mask and labels.
    """

    def __init__(self, model, base_model, text_config):
        self.model, self.base_model, self.text_config = model, base_model, text_config
        self.log_probs = self.z_loss = self.router = None

    def __call__(self, fused_lm_head=False, **kwargs):
        if not fused_lm_head:  # the parent's second forward pass, for deprecated `compute_metrics`
            return self.model(**kwargs)
        found = []
        with_z_loss = getattr(self.text_config, "router_z_loss_coef", 0.0) != 0
        if with_z_loss:
            kwargs["output_router_logits"] = True
        hook = self.base_model.register_forward_hook(lambda *args: found.append(args[-1].get("router_logits")))
        try:
            outputs = self.model(**kwargs, fused_lm_head=True)
        finally:
            hook.remove()
        if kwargs.get("output_router_logits") and hasattr(self.text_config, "router_aux_loss_type"):
            self.router = (found[0], *(kwargs.get(name) for name in ("input_ids", "attention_mask", "labels")))
            outputs.aux_loss, z_loss = router_losses(found[0], self.text_config, kwargs.get("attention_mask"))
            self.z_loss = z_loss if with_z_loss else None
        self.log_probs = outputs.log_probs
        return outputs
