"""What the tests of `preference_trainer` and their likes share."""

import copy

import torch

from helpers.preference_trainers import log_probabilities
from llava_mod_hf.teachers.reference_model import REFERENCE_COLUMNS

PAIRS = 4


def small_image_teacher(teacher):
    """The teacher, reading images of half the size: a quarter of the patches and of the image tokens."""
    config = copy.deepcopy(teacher.config)
    config.vision_config.image_size, config.image_seq_length = 32, 4
    other = type(teacher)(config).eval()
    state = teacher.state_dict()
    for name, value in other.state_dict().items():
        value.copy_(state[name][: len(value)] if "position_embedding" in name else state[name])
    return other


def batch_of(trainer, indices=range(PAIRS)):
    return trainer.data_collator([trainer.train_dataset[i] for i in indices])


def with_reference(dataset, teacher, trainer):
    """The rows with the teacher's log-probabilities as columns, each pair by itself."""
    values = []
    with torch.no_grad():
        for index in range(len(dataset)):
            values.append(log_probabilities(teacher, batch_of(trainer, [index]))[0].tolist())
    for name, column in zip(REFERENCE_COLUMNS, zip(*values, strict=True), strict=True):
        dataset = dataset.add_column(name, list(column))
    return dataset
