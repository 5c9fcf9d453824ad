"""A run that is told to go, by SIGTERM or SIGUSR1 as Slurm does, saves a checkpoint and ends so that it is taken up."""

import contextlib
import signal
import threading

import torch
from transformers import TrainerCallback

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again later


class RunInterrupted(SystemExit):
    """
    A run was told to go, and has saved where it is: whoever starts it again goes on there.

    Attributes:
        code (`int`): 75, with which a process ends that does not catch this.
        message (`str`): one sentence.
    """

    def __init__(self, message):
        super().__init__(EXIT_CODE)
        self.message = message

    def __str__(self):
        return self.message


class Interruption(TrainerCallback):
    """
    Listens to `SIGNALS` while a trainer trains; after the step in which one comes, the checkpoint is written and
    training stops, in all processes at the same step.

    Not transformers' `enable_jit_checkpoint`: it writes within a step, whose random numbers have been drawn, waits
    three seconds by a timer of each process's own, and ends training as if that were whole.

    Args:
        trainer (`Trainer`): whose processes are asked.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self.name = None  # of the signal that has come to this process
        self.stopped = False

    @contextlib.contextmanager
    def listening(self):
        """Signals that somebody else handles stay his; so do all of them in a thread, where Python hears none."""
        self.name, self.stopped = None, False
        mine = [each for each in SIGNALS if signal.getsignal(each) == signal.SIG_DFL]
        if threading.current_thread() is not threading.main_thread():
            mine = []
        for each in mine:
            signal.signal(each, self._note)
        try:
            yield
        finally:
            for each in mine:
                signal.signal(each, signal.SIG_DFL)

    def _note(self, number, frame):
        self.name = signal.Signals(number).name

    def on_step_end(self, args, state, control, **kwargs):
        if self._is_told() and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True

    def _is_told(self):
        accelerator = self.trainer.accelerator
        if accelerator.num_processes == 1:
            return self.name is not None
        told = torch.tensor([self.name is not None], device=accelerator.device).float()
        return bool(accelerator.reduce(told).item())

    def end(self):
        """
        Raises:
            RunInterrupted: if training stopped for this.
        """
        if self.stopped:
            step = self.trainer.state.global_step
            raise RunInterrupted(
                f"{self.name or 'A signal to another process'} came, and the run stopped after step {step} of "
                f"{self.trainer.state.max_steps} with the checkpoint `{self.trainer.args.output_dir}/checkpoint-{step}`"
                ": start it again as it was, and it goes on from there."
            )
