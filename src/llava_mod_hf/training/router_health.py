"""What a sparse student's routers do while it trains."""

import logging

import torch
from accelerate.utils import is_peft_model
from transformers import Trainer

from llava_mod_hf.evaluation.expert_load import (
    MODALITIES,
    choices_of,
    count_choices,
    has_collapsed,
    modalities,
    router_figures,
    shares,
    sum_entropy,
)
from llava_mod_hf.students.router_bias import router_biases
from llava_mod_hf.training.router_balance import RouterBalance
from llava_mod_hf.training.run_lines import ROUTER_FILE, add_lines

logger = logging.getLogger(__name__)


class RouterSums:
    """Sums over the batches since the last log, of this process; they stay on its device."""

    def __init__(self):
        self._sums = None

    @torch.no_grad()
    def note(self, router_logits, top_k, tokens_are, biases):
        """
        Adds a batch.

        Args:
            router_logits (`tuple[torch.FloatTensor]`): per layer `(batch * sequence, experts)`.
            top_k (`int`): experts that a token is sent to.
            tokens_are (`torch.LongTensor` of shape `(batch * sequence,)`): as
                [`~llava_mod_hf.evaluation.expert_load.modalities`] says.
            biases (`list`): of [`~llava_mod_hf.students.router_bias.router_biases`].

        Returns:
            `torch.LongTensor` of shape `(layers, experts)`: how often each expert was chosen.
        """
        router_logits = [logits.to(router_logits[0].device) for logits in router_logits]
        tokens_are = tokens_are.to(router_logits[0].device)
        chosen, num_experts = choices_of(router_logits, top_k, biases), router_logits[0].shape[-1]
        found = (
            count_choices(chosen, num_experts, tokens_are, len(MODALITIES)),
            sum_entropy(router_logits, tokens_are, len(MODALITIES)).sum(1),
            (tokens_are < len(MODALITIES)).sum(),
        )
        self._sums = found if self._sums is None else [a + b for a, b in zip(self._sums, found, strict=True)]
        return found[0].sum(1)

    def take(self, accelerator, tp_size=1):
        """
        What there is of all processes, which have to call this together; the sums start anew.

        Args:
            accelerator (`Accelerator`).
            tp_size (`int`, *optional*, defaults to 1): processes that read the same rows.

        Returns:
            `tuple[int, list[dict]]` or `None`: the tokens, and per layer
            [`~llava_mod_hf.evaluation.expert_load.router_figures`] with `load_by_modality`.
        """
        if self._sums is None:
            return None
        choices, entropy, tokens = (accelerator.reduce(value).tolist() for value in self._sums)
        self._sums = None
        if not tokens:
            return None
        return tokens // tp_size, [_figures(*layer, tokens) for layer in zip(choices, entropy, strict=True)]


def _figures(choices, entropy, tokens):
    of_all = [sum(column) for column in zip(*choices, strict=True)]
    by_modality = {name: shares(row) for name, row in zip(MODALITIES, choices, strict=True) if any(row)}
    return {**router_figures(of_all, entropy, tokens), "load_by_modality": by_modality}


class WatchesRouters(Trainer):
    """
    For a trainer, before its own parent: with each `loss` five figures of the routers are logged, and those of each
    layer written to `router.jsonl` in its folder. They are of the logits that the router's losses are computed of, in
    all batches since the last log; with `gumbel_second_expert`, before its noise. The first log of routers that send
    all tokens to the same experts is a warning, too.

    With `router_bias_update` the routers' biases are moved ([`~llava_mod_hf.training.router_balance.RouterBalance`]).
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._router_sums = RouterSums()
        self._router_balance = None
        if getattr(self.args, "router_bias_update", 0.0):
            self._router_balance = RouterBalance(self)
            self.add_callback(self._router_balance)
        self._told_collapse = False

    def note_routers(self, router_logits, input_ids, attention_mask, labels):
        """Takes in what a batch's routers said, if it is one of training; tokens with a label are of an answer."""
        if self.model.training:
            config = self.model.config
            tokens_are = modalities(input_ids, attention_mask, labels != -100, config.image_token_index)
            top_k, biases = config.get_text_config().num_experts_per_tok, router_biases(self._plain_student())
            choices = self._router_sums.note(router_logits, top_k, tokens_are, biases)
            if self._router_balance is not None:
                self._router_balance.note(choices)

    def _plain_student(self):
        return self.model.get_base_model() if is_peft_model(self.model) else self.model

    def log(self, logs, start_time=None):
        found = self._router_sums.take(self.accelerator, self.get_tp_size()) if "loss" in logs else None
        if found is not None:
            tokens, layers = found
            for name, value in summary(layers).items():
                logs[f"router/{name}"] = value
            if self.is_world_process_zero():
                indices = getattr(self.model.config, "moe_layers", None) or range(len(layers))
                told = {index: figures for index, figures in zip(indices, layers, strict=True)}
                self._tell_collapse(told)
                line = {"step": self.state.global_step, "tokens": tokens, "layers": told}
                add_lines(f"{self.args.output_dir}/{ROUTER_FILE}", [line])
        super().log(logs, start_time)

    def _tell_collapse(self, layers):
        top_k = self.model.config.get_text_config().num_experts_per_tok
        collapsed = [str(index) for index, layer in layers.items() if has_collapsed(layer["load"], top_k)]
        if collapsed and not self._told_collapse:
            self._told_collapse = True
            logger.warning(
                "At step %d the routers of layers %s send all tokens to the same %d of their experts, so that the "
                "others learn nothing: give `router_bias_update`, or a larger `router_aux_loss_coef`.",
                self.state.global_step,
                ", ".join(collapsed),
                top_k,
            )


def summary(layers):
    """
    The figures of all layers in five.

    Args:
        layers (`list[dict]`): [`~llava_mod_hf.evaluation.expert_load.router_figures`] of each.

    Returns:
        `dict[str, float]`: the means of `entropy`, `load_entropy`, `dead_experts` and `overloaded_experts`, and the
        largest `max_load`.
    """
    means = ("entropy", "load_entropy", "dead_experts", "overloaded_experts")
    found = {name: sum(layer[name] for layer in layers) / len(layers) for name in means}
    return {**found, "max_load": max(layer["max_load"] for layer in layers)}
