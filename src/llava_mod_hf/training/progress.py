"""What is shown and measured of a run while it trains: one bar on a terminal, and plain lines elsewhere."""

import datetime
import sys
import time

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from llava_mod_hf.training.logs import TOKENS, kind_of_logs

# what is logged, its short name, and how it is written
FIGURES = {
    "loss": "loss {:.4g}",
    "kl": "kl {:.4g}",
    "learning_rate": "lr {:.2e}",
    "tokens_per_second": "{:,.0f} tokens/s",
}

# parts of an evaluation's logs that tell how long it took
COST = ("_runtime", "_per_second", "_num_tokens")


def figures_of(logs):
    """`str`: the figures of a training's logs that one watches."""
    return ", ".join(text.format(float(logs[name])) for name, text in FIGURES.items() if name in logs)


def evaluation_of(logs, prefix):
    """`str`: the figures of an evaluation's logs, without those of parts of it (a slash) and what it cost."""
    shown = [name for name in logs if name.startswith(prefix) and "/" not in name and not name.endswith(COST)]
    return ", ".join(f"{name} {float(logs[name]):.4g}" for name in shown)


class Bar(ProgressCallback):
    """The parent prints every log line above its bar; here the bar has the last figures, and evaluations a line."""

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        bar, self.current_step = self.training_bar, state.global_step
        if bar is not None:
            bar.initial = bar.n = state.global_step  # else a resumed run would seem to have run all steps at once
            bar.smoothing = 0  # the time left by all steps of this start, those with an evaluation too
            bar.bar_format = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{remaining} left{postfix}]"
            bar.refresh()

    def on_log(self, args, state, control, logs=None, **kwargs):
        kind = kind_of_logs(logs or {})
        if self.training_bar is None or kind is None:
            return
        if kind[0] == "eval":
            self.training_bar.write(f"step {state.global_step}: {evaluation_of(logs, kind[1])}", file=sys.stderr)
        elif "loss" in logs:
            self.training_bar.set_postfix_str(figures_of(logs))


class Lines(PrinterCallback):
    """The parent prints a dictionary to standard output; here a line goes to where the bar would be."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.start, self.first = time.perf_counter(), state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        kind = kind_of_logs(logs or {})
        if not state.is_world_process_zero or kind is None:
            return
        if kind[0] == "eval":
            self._write(f"step {state.global_step}: {evaluation_of(logs, kind[1])}")
        elif "loss" in logs:
            left = datetime.timedelta(seconds=round(self._seconds_left(state)))
            self._write(f"step {state.global_step}/{state.max_steps}: {figures_of(logs)}, {left} left")

    def _seconds_left(self, state):
        taken = max(state.global_step - self.first, 1)
        return (time.perf_counter() - self.start) / taken * (state.max_steps - state.global_step)

    def _write(self, line):
        sys.stderr.write(line + "\n")
        sys.stderr.flush()


class Clock(TrainerCallback):
    """Time of training since it was last asked, without that of evaluations and checkpoints."""

    def __init__(self):
        self._restart()

    def _restart(self):
        self.start = self.end = time.perf_counter()
        self.pauses = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self._restart()

    def on_step_end(self, args, state, control, **kwargs):
        self.end = time.perf_counter()

    def on_evaluate(self, args, state, control, **kwargs):
        self.pauses, self.end = self.pauses + time.perf_counter() - self.end, time.perf_counter()

    def on_save(self, args, state, control, **kwargs):
        self.on_evaluate(args, state, control)

    def take(self):
        """`float`: seconds."""
        seconds = time.perf_counter() - self.start - self.pauses
        self._restart()
        return seconds


class StepTimer(TrainerCallback):
    """Time of a step, without that of the first: it starts the loader's processes and warms everything up."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.ends = []

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append(time.perf_counter())

    def seconds_per_step(self):
        """`float`, or `None` after fewer than two steps."""
        return (self.ends[-1] - self.ends[0]) / (len(self.ends) - 1) if len(self.ends) > 1 else None


class ShowsProgress(Trainer):
    """
    For a trainer, before its own parent: [`Bar`] on a terminal, [`Lines`] elsewhere and with `disable_tqdm`, in place
    of transformers' own two; a notebook's table, and callbacks that somebody gives, are left. With each `loss` also
    `tokens_per_second` is logged, of all processes, padding left out.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._clock, self._tokens_before = Clock(), 0
        self.add_callback(self._clock)
        for callback in list(self.callback_handler.callbacks):
            if type(callback) in (PrinterCallback, ProgressCallback):
                self.remove_callback(callback)
                self.add_callback(Bar if sys.stderr.isatty() and not self.args.disable_tqdm else Lines)

    def log(self, logs, start_time=None):
        if "loss" in logs:
            tokens = logs.get(TOKENS) or next(iter(self._metrics["train"].get(TOKENS, ())), 0)
            seconds = self._clock.take()
            if tokens > self._tokens_before and seconds > 0:
                logs["tokens_per_second"] = (tokens - self._tokens_before) / seconds
            self._tokens_before = tokens
        super().log(logs, start_time)
