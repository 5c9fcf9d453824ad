"""What a sparse student's routers do while it trains."""

import torch
from transformers import Trainer

from llava_mod_hf.evaluation.expert_load import count_choices, router_figures, sum_entropy
from llava_mod_hf.training.run_lines import ROUTER_FILE, add_lines


class RouterSums:
    """Sums over the batches since the last log, of this process; they stay on its device."""

    def __init__(self):
        self._sums = None

    @torch.no_grad()
    def note(self, router_logits, top_k, attention_mask=None):
        """
        Adds a batch.

        Args:
            router_logits (`tuple[torch.FloatTensor]`): per layer `(batch * sequence, experts)`.
            top_k (`int`): experts that a token is sent to.
            attention_mask (`torch.Tensor` of shape `(batch, sequence)`, *optional*): padding, which does not count.
        """
        router_logits = [logits.to(router_logits[0].device) for logits in router_logits]
        counted = torch.ones(len(router_logits[0]), dtype=torch.bool, device=router_logits[0].device)
        if attention_mask is not None:
            counted = attention_mask.reshape(-1).to(counted)
        found = (count_choices(router_logits, top_k, counted), sum_entropy(router_logits, counted), counted.sum())
        self._sums = found if self._sums is None else [a + b for a, b in zip(self._sums, found, strict=True)]

    def take(self, accelerator, tp_size=1):
        """
        What there is of all processes, which have to call this together; the sums start anew.

        Args:
            accelerator (`Accelerator`).
            tp_size (`int`, *optional*, defaults to 1): processes that read the same rows.

        Returns:
            `tuple[int, list[dict]]` or `None`: the tokens, and per layer
            [`~llava_mod_hf.evaluation.expert_load.router_figures`].
        """
        if self._sums is None:
            return None
        choices, entropy, tokens = (accelerator.reduce(value).tolist() for value in self._sums)
        self._sums = None
        if not tokens:
            return None
        return tokens // tp_size, [router_figures(*layer, tokens) for layer in zip(choices, entropy, strict=True)]


class WatchesRouters(Trainer):
    """
    For a trainer, before its own parent: with each `loss` four figures of the routers are logged, and those of each
    layer written to `router.jsonl` in its folder. They are of the logits that the router's losses are computed of, in
    all batches since the last log; with `gumbel_second_expert`, before its noise.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._router_sums = RouterSums()

    def note_routers(self, router_logits, attention_mask):
        """Takes in what a batch's routers said, if it is one of training."""
        if self.model.training:
            top_k = self.model.config.get_text_config().num_experts_per_tok
            self._router_sums.note(router_logits, top_k, attention_mask)

    def log(self, logs, start_time=None):
        found = self._router_sums.take(self.accelerator, self.get_tp_size()) if "loss" in logs else None
        if found is not None:
            tokens, layers = found
            for name, value in summary(layers).items():
                logs[f"router/{name}"] = value
            if self.is_world_process_zero():
                indices = getattr(self.model.config, "moe_layers", None) or range(len(layers))
                told = {index: figures for index, figures in zip(indices, layers, strict=True)}
                line = {"step": self.state.global_step, "tokens": tokens, "layers": told}
                add_lines(f"{self.args.output_dir}/{ROUTER_FILE}", [line])
        super().log(logs, start_time)


def summary(layers):
    """
    The figures of all layers in four.

    Args:
        layers (`list[dict]`): [`~llava_mod_hf.evaluation.expert_load.router_figures`] of each.

    Returns:
        `dict[str, float]`: the means of `entropy`, `load_entropy` and `dead_experts`, and the largest `max_load`.
    """
    means = ("entropy", "load_entropy", "dead_experts")
    found = {name: sum(layer[name] for layer in layers) / len(layers) for name in means}
    return {**found, "max_load": max(layer["max_load"] for layer in layers)}
