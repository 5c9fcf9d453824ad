"""Stops a run at the step whose loss or weights are no numbers any more."""

import torch
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

# Steps in a row that fp16's gradient scaler may skip with a loss that is not finite. It halves its scale with each,
# and the loss does not depend on it: more of them will not help.
SKIPPED_IN_A_ROW = 16


class FiniteSteps(TrainerCallback):
    """
    Looks at the loss and the trained weights after each step, before its checkpoint is written.

    Gradients are not looked at: fp16's gradient scaler skips steps whose gradients are too large, as it should.

    Args:
        trainer (`Trainer`): which tells the losses by [`FiniteSteps.note`].
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self.is_finite = True  # of the losses since the last step
        self.skipped = 0

    def note(self, loss):
        """Takes in the loss of a micro-batch, without waiting for it."""
        self.is_finite = loss.detach().isfinite().all() & self.is_finite

    def on_step_end(self, args, state, control, **kwargs):
        accelerator = self.trainer.accelerator
        broken = [not self.is_finite, not has_finite_weights(self.trainer.model)]
        self.is_finite = True
        # so that every process stops, or none
        loss, weights = accelerator.reduce(torch.tensor(broken, device=accelerator.device).float()).tolist()
        was_skipped = accelerator.optimizer_step_was_skipped
        self.skipped = self.skipped + bool(loss) if was_skipped else 0
        if weights or (loss and not (was_skipped and self.skipped <= SKIPPED_IN_A_ROW)):
            what = "trained weights" if weights else "the loss"
            raise ValueError(
                f"Training was stopped at step {state.global_step}: {what} held "
                "values that are not finite. Nothing of this step was saved. Begin anew with a smaller "
                "`learning_rate`, with `max_grad_norm: 1.0` or with bf16 in place of fp16, and look at the step's rows."
            )


def has_finite_weights(model):
    """Whether all trained parameters of a model are finite, as far as this process holds them."""
    trained = [parameter.detach() for parameter in model.parameters() if parameter.requires_grad]
    local = [parameter.to_local() if isinstance(parameter, DTensor) else parameter for parameter in trained]
    finite = [parameter.isfinite().all() for parameter in local]
    return not finite or bool(torch.stack([flag.to(finite[0].device) for flag in finite]).all())
