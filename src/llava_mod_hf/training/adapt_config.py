"""Options of the adaptor stage, apart from its trainer, so that `--help` need not import that."""

from dataclasses import dataclass, field

from trl import SFTConfig

from llava_mod_hf.training.trainable import check_train_modules
from llava_mod_hf.training.trainer_options import check_dependent_options, check_options


@dataclass
class AdaptConfig(SFTConfig):
    """
    [`~trl.SFTConfig`] of the adaptor stage.

    Args:
        train_modules (`list[str]`, *optional*):
            Parts that are trained, as in [`~llava_mod_hf.MimicConfig`]; by default the paper's, the adaptor alone.
    """

    train_modules: list[str] | None = field(default=None)

    def __post_init__(self):
        check_options(self, "adapt")
        super().__post_init__()
        check_dependent_options(self, "adapt")
        check_train_modules(self.train_modules)
