"""Balances a student's experts without a loss: a bias of each router is moved after every step (arXiv 2408.15664)."""

import math

import torch
from accelerate.utils import is_peft_model
from transformers import TrainerCallback

from llava_mod_hf.students.router_bias import add_router_bias, router_biases


def check_router_bias_update(rate, *, use_peft=False):
    """
    Args:
        rate (`float`): what each step adds to a bias, or takes from it.
        use_peft (`bool`, *optional*, defaults to `False`): whether an adapter is trained.

    Raises:
        ValueError: if it is negative or no number, or the biases would not be saved.
    """
    if not math.isfinite(rate) or rate < 0:
        raise ValueError(f"`router_bias_update` is {rate}: give a number of 0 or more, such as 0.001.")
    if rate and use_peft:
        raise ValueError(
            f"`router_bias_update` is {rate}, and an adapter is trained, whose file holds no routers' biases: leave "
            "one of the two out."
        )


class RouterBalance(TrainerCallback):
    """
    Loss-Free Balancing (arXiv 2408.15664, algorithm 1), as DeepSeek-V3 has it. After each optimiser step, of every
    router

        b_e ← b_e + rate · sign(c̄ − c_e)

    where c_e are the tokens that expert e was chosen for, of all processes and accumulation steps, and c̄ is their mean.

    Args:
        trainer (`Trainer`): its `args` have `router_bias_update`, its `model` gets biases where it has none.

    Raises:
        ValueError: if the model has no routers, or is an adapter.
    """

    def __init__(self, trainer):
        self.trainer, self._choices = trainer, None
        check_router_bias_update(trainer.args.router_bias_update, use_peft=is_peft_model(trainer.model))
        add_router_bias(trainer.model)

    def note(self, choices):
        """Adds a batch's choices of each layer and expert, `(layers, experts)`, of this process."""
        self._choices = choices if self._choices is None else self._choices + choices

    @torch.no_grad()
    def on_step_end(self, args, state, control, **kwargs):
        if self._choices is None:
            return
        choices, self._choices = self.trainer.accelerator.reduce(self._choices), None
        for bias, load in zip(router_biases(self.trainer.model), choices, strict=True):
            bias += args.router_bias_update * (load.sum() - len(load) * load).sign().to(bias)  # of whole numbers
