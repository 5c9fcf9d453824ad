"""What the tests of `preference_trainer` and their likes share."""

import copy

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
