"""The stages of the command line on tiny models, through their argument dataclasses."""

from transformers import TrainerCallback

from helpers.ddp_gradients import RUN
from llava_mod_hf import MimicConfig, PreferenceConfig
from llava_mod_hf.commands import adapt as adapt_module
from llava_mod_hf.commands import mimic as mimic_module
from llava_mod_hf.commands import prefer as prefer_module
from llava_mod_hf.commands.arguments import DistillArguments, StudentArguments, UpcycleArguments
from llava_mod_hf.data.arguments import DataArguments
from llava_mod_hf.training.adapt_config import AdaptConfig

TOKEN = "hf_not_a_token"
ARGUMENTS = {
    **RUN,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "max_steps": 2,
    "hub_token": TOKEN,
}


def data_arguments(config="mixture"):
    return DataArguments(dataset_name="embedded:easy-vqa", dataset_config=config, max_samples=8)


def adapt(folders, output_dir, **args):
    student_args = StudentArguments(vision_tower=folders["teacher"], language_model=folders["language_model"])
    return adapt_module.run(
        data_arguments("captions"), student_args, AdaptConfig(output_dir=str(output_dir), **{**ARGUMENTS, **args})
    )


def mimic(folders, output_dir, moe_layers=None, **args):
    return mimic_module.run(
        data_arguments(),
        DistillArguments(student=folders["student"], teacher=folders["teacher"]),
        UpcycleArguments(moe_layers=moe_layers),
        MimicConfig(output_dir=str(output_dir), **{**ARGUMENTS, **args}),
    )


def prefer(folders, output_dir, **args):
    distill_args = DistillArguments(student=folders["student"], teacher=folders["teacher"])
    args = PreferenceConfig(output_dir=str(output_dir), **{**ARGUMENTS, **args})
    return prefer_module.run(data_arguments("preferences"), distill_args, args)


class StopsAt(TrainerCallback):
    """Raises at the end of a step, before its checkpoint is written, and counts the steps until then."""

    def __init__(self, step=None):
        self.step, self.taken = step, 0

    def on_step_end(self, args, state, control, **kwargs):
        self.taken += 1
        if state.global_step == self.step:
            raise InterruptedError(f"stopped at step {self.step}")
