"""Options of the adaptor stage, apart from its trainer, so that `--help` need not import that."""

from dataclasses import dataclass, field

from trl import SFTConfig

from llava_mod_hf.training.batch_options import BatchOptions, check_batches
from llava_mod_hf.training.hub_options import HubOptions, check_hub
from llava_mod_hf.training.lora_options import LoraOptions, check_lora
from llava_mod_hf.training.trainable import check_train_modules
from llava_mod_hf.training.trainer_options import check_dependent_options, check_options
from llava_mod_hf.training.validation_options import ValidationOptions, check_validation, choose_direction
from llava_mod_hf.training.vision_options import VisionOptions, check_vision_cache


@dataclass
class AdaptConfig(BatchOptions, ValidationOptions, LoraOptions, HubOptions, VisionOptions, SFTConfig):
    """
    [`~trl.SFTConfig`] of the adaptor stage.

    The options of [`~llava_mod_hf.training.batch_options.BatchOptions`],
    [`~llava_mod_hf.training.lora_options.LoraOptions`],
    [`~llava_mod_hf.training.validation_options.ValidationOptions`],
    [`~llava_mod_hf.training.hub_options.HubOptions`] and
    [`~llava_mod_hf.training.vision_options.VisionOptions`] are options of it too.

    Args:
        train_modules (`list[str]`, *optional*):
            Parts that are trained, as in [`~llava_mod_hf.MimicConfig`]; by default the paper's, the adaptor alone.
    """

    train_modules: list[str] | None = field(default=None)

    def __post_init__(self):
        check_options(self, "adapt")
        choose_direction(self)
        super().__post_init__()
        check_dependent_options(self, "adapt")
        check_train_modules(self.train_modules)
        check_batches(self)
        check_lora(self)
        check_validation(self)
        check_hub(self)
        check_vision_cache(self)
