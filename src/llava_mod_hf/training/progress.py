"""What is shown and measured of a run while it trains."""

import time

from transformers import ProgressCallback, TrainerCallback


class LossOnBar(ProgressCallback):
    """The parent prints every log line above the bar; the last loss beside it is enough, and `run.json` has all."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and "loss" in (logs or {}):
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.3f}")


class StepTimer(TrainerCallback):
    """Time of a step, without that of the first: it starts the loader's processes and warms everything up."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.ends = []

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append(time.perf_counter())

    def seconds_per_step(self):
        """`float`, or `None` after fewer than two steps."""
        return (self.ends[-1] - self.ends[0]) / (len(self.ends) - 1) if len(self.ends) > 1 else None
