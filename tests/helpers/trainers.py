"""The three trainers on a few embedded rows, by the name of their stage."""

import pytest

from helpers.ddp_gradients import EVERYTHING, RUN, mimic_trainer, rows
from helpers.preference_trainers import preference_trainer
from llava_mod_hf.training.adapt_trainer import AdaptConfig, AdaptTrainer


def adapt_trainer(
    student, teacher, processor, folder, *, batch=4, accumulation=1, callbacks=None, dataset=None, **args
):
    config = AdaptConfig(
        output_dir=str(folder),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        **{**RUN, "train_modules": EVERYTHING, **args},
    )
    return AdaptTrainer(
        student, config, train_dataset=dataset or rows(), processing_class=processor, callbacks=callbacks
    )


TRAINERS = {"adapt": adapt_trainer, "mimic": mimic_trainer, "prefer": preference_trainer}

ONE_FAST = ["mimic", *(pytest.param(stage, marks=pytest.mark.slow) for stage in ("adapt", "prefer"))]
