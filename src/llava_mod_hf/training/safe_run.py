"""What all trainers of this package do about a run's folder, its Hub repository and its end."""

from pathlib import Path

from datasets import IterableDataset
from transformers import TrainerCallback
from transformers.trainer_utils import HubStrategy, TrainOutput
from transformers.utils import PushInProgress

from llava_mod_hf.data.fitting import check_images_fit
from llava_mod_hf.publishing.destination import open_destination
from llava_mod_hf.publishing.provenance import RUN_FILE
from llava_mod_hf.teachers.protocol import row_sets
from llava_mod_hf.teachers.sharded import of_its_own_class
from llava_mod_hf.training.checkpoints import STATE_FILE, chosen_checkpoint
from llava_mod_hf.training.finite_steps import FiniteSteps
from llava_mod_hf.training.hub_pushes import destination_of, push_model
from llava_mod_hf.training.interruption import Interruption
from llava_mod_hf.training.output_folder import told_when_not_written, unfinished_folder
from llava_mod_hf.training.rows_read import CountsRows
from llava_mod_hf.training.run_recipe import Recipe, check_same_recipe, resolved_options, write_processes, write_recipe


class AllStepsTaken(Exception):
    """The checkpoint that a run is taken up from is that of its last step."""


class EndAtLastStep(TrainerCallback):
    """The parent's loop takes a step before it looks whether there is one left to take."""

    def on_epoch_begin(self, args, state, control, **kwargs):
        if state.max_steps > 0 and state.global_step >= state.max_steps:
            raise AllStepsTaken


class SafeRun(CountsRows):
    """
    For a trainer, before its own parent:

    - a `max_length` that cuts through an image is refused, where the rows did not go through
      [`~llava_mod_hf.data.fitting.fit_rows`];
    - a run stops at the step whose loss or weights are not finite, and writes nothing of it;
    - `train` takes up whole checkpoints alone, of the same recipe, and takes no step more than there are; a stream that
      ends before begins anew, so that it goes on with the right row there too;
    - SIGTERM and SIGUSR1 end it with a checkpoint ([`~llava_mod_hf.training.interruption.Interruption`]);
    - of a mixture, the rows that were read of each data set are counted
      ([`~llava_mod_hf.training.rows_read.CountsRows`]);
    - no file that it writes contains the Hub token, and what it pushes is the model alone, without a path of this
      machine.

    Attributes:
        recipe ([`~llava_mod_hf.training.run_recipe.Recipe`]): written into each checkpoint; of the trainer's arguments
            alone, unless a stage has set it.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for rows in row_sets(self.train_dataset, self.eval_dataset):
            check_images_fit(
                rows,
                self.processing_class,
                max_length=self.args.max_length,
                num_proc=self.args.dataset_num_proc,
            )
        if isinstance(self.train_dataset, IterableDataset):
            # the parent's resumption knows no second pass: it would skip batches in the first alone
            self.train_dataset = self.train_dataset.repeat(None)
        self.recipe = None
        self._finite_steps = FiniteSteps(self)
        self.add_callback(self._finite_steps)
        self.add_callback(EndAtLastStep)
        self._interruption = Interruption(self)
        self.add_callback(self._interruption)

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """
        The parent's, from a checkpoint that is whole and of the same recipe.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*): as in
                [`~llava_mod_hf.training.checkpoints.chosen_checkpoint`], by default what `args` say, or from the start.

        Raises:
            RunInterrupted: if a signal ended it.
            ValueError: if the checkpoint is missing, damaged or of another recipe, the run stops being finite, or no
                evaluation gives the `metric_for_best_model`.
        """
        choice = self.args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        checkpoint = chosen_checkpoint(False if choice is None else choice, self.args.output_dir)
        self.recipe = self.recipe or Recipe(resolved_options(self.args), {}, self.args.world_size)
        if checkpoint is not None:
            check_same_recipe(checkpoint, self.recipe)
        try:
            with self._interruption.listening():
                output = super().train(checkpoint or False, *args, **kwargs)
            self._interruption.end()
            return output
        except AllStepsTaken:
            if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
                self._load_best_model()
            self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
            return TrainOutput(self.state.global_step, 0.0, {})
        except KeyError as error:
            if "`metric_for_best_model`" not in str(error):  # the parent's own words, of several lines
                raise
            known = [name for name in (self.state.log_history or [{}])[-1] if name.startswith("eval_")]
            raise ValueError(
                f"`metric_for_best_model` is `{self.args.metric_for_best_model}`, and an evaluation gives "
                f"{', '.join(known)}: give one of those."
            ) from error

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self._finite_steps.note(loss)
        return loss

    # The parent writes its arguments as a pickle, with the Hub token.
    def save_model(self, output_dir=None, _internal_call=False):
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        token, self.args.hub_token = self.args.hub_token, None
        try:
            super().save_model(str(folder), _internal_call=True)
        finally:
            self.args.hub_token = token
        if self.args.should_save:
            (folder / "training_args.bin").unlink(missing_ok=True)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save")

    # What FSDP2 and DeepSpeed have gathered holds a tied head as a tensor of its own: it would be written twice.
    def _save(self, output_dir=None, state_dict=None):
        model = self.accelerator.unwrap_model(self.model)
        tied = getattr(model, "all_tied_weights_keys", {})
        if state_dict is not None:
            state_dict = {name: value for name, value in state_dict.items() if tied.get(name) not in state_dict}
        with of_its_own_class(model):
            super()._save(output_dir, state_dict=state_dict)

    def _save_checkpoint(self, model, trial):
        folder = Path(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
        with told_when_not_written(folder):
            if self.args.should_save:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / STATE_FILE).unlink(missing_ok=True)  # of a damaged one, which it would call whole
                write_recipe(self.recipe, folder)
                write_processes(self.recipe.processes, folder)
            super()._save_checkpoint(model, trial)

    # The parent has not looked for a token that may write, and pushes into a public repository what should be private.
    def init_hf_repo(self, token=None, private=None):
        if self.is_world_process_zero():
            model_type = None if hasattr(self.model, "peft_config") else self.model.config.model_type
            to = destination_of(self.args, token=token, private=private, tag=True)
            self.hub_model_id = open_destination(to, model_type)
            self.push_in_progress = None

    # The parent commits its output folder, where logs and the pickle of its arguments lie.
    def _push_from_checkpoint(self, checkpoint_folder):
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        if self.push_in_progress is not None and not (self.args.hub_always_push or self.push_in_progress.is_done()):
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        message = f"Training in progress, step {self.state.global_step}"
        to = destination_of(self.args, repo_id=self.hub_model_id)
        job = push_model(checkpoint_folder, to, message=message, output_dir=self.args.output_dir, blocking=False)
        running = [] if self.push_in_progress is None else self.push_in_progress.jobs
        self.push_in_progress = PushInProgress([*running, job])

    def push_to_hub(
        self, commit_message="End of training", blocking=True, token=None, revision=None, private=None, **kwargs
    ):
        """
        The parent's, of the model's files alone, and of a finished stage with its card and recipe; see
        [`~llava_mod_hf.training.hub_pushes.push_model`]. A tag goes to the commit of a finished stage.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if getattr(self, "hub_model_id", None) is None:
            self.init_hf_repo(token=token, private=private)
        with unfinished_folder(self.args.output_dir, self.args.should_save) as folder:
            self.save_model(folder, _internal_call=True)
            if not self.is_world_process_zero():
                return None
            self._finish_current_push()
            finished = Path(self.args.output_dir, RUN_FILE).is_file()
            given = {"token": token, "revision": revision, "private": private}
            to = destination_of(self.args, repo_id=self.hub_model_id, tag=finished, **given)
            options = {"output_dir": self.args.output_dir, "finished": finished, "blocking": blocking}
            return push_model(folder, to, message=commit_message, **options)

    # TRL's card names no base model and another task; `llava-mod publish` writes ours, from measured results.
    def create_model_card(self, *args, **kwargs):
        pass
