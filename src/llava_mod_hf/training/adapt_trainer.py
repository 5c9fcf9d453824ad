"""Adaptor initialisation: next-token cross-entropy, only the adaptor is trained (paper, stage 1)."""

from dataclasses import dataclass, field

from trl import SFTConfig, SFTTrainer

from llava_mod_hf.data.grouping import GroupedBatches
from llava_mod_hf.students.generation import prepare_generation
from llava_mod_hf.training.logs import KeepsMetrics
from llava_mod_hf.training.trainable import check_train_modules, train_only
from llava_mod_hf.training.trainer_options import check_dependent_options, check_options, check_trainer


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


class AdaptTrainer(KeepsMetrics, GroupedBatches, SFTTrainer):
    """
    [`~trl.SFTTrainer`] that trains the adaptor alone, or what [`AdaptConfig`] names, and whose
    `train_sampling_strategy: group_by_length` knows rows with images.
    """

    def __init__(self, model, args=None, **kwargs):
        args = args or AdaptConfig()
        check_trainer(args, AdaptConfig, model, **kwargs)
        super().__init__(model, args, **kwargs)
        train_only(self.model, args.train_modules, default=["adaptor"])
        prepare_generation(self.model, self.processing_class)
