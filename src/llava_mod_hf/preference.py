"""Preference distillation: preference optimisation with the teacher as the reference model (paper, section 3.3)."""

from dataclasses import dataclass, field

from trl import DPOConfig, DPOTrainer

from llava_mod_hf.teacher import check_teacher


@dataclass
class PreferenceConfig(DPOConfig):
    """
    [`~trl.DPOConfig`]; the loss is TRL's, by default `sigmoid` (DPO) with β = 0.1, as in the paper's first version.

    Args:
        train_modules (`list[str]`, *optional*):
            Parts that are trained, of `vision_tower`, `adaptor`, `language_model`, `ffn` (FFNs, experts and routers);
            by default the paper's, FFNs and adaptor.
    """

    train_modules: list[str] | None = field(default=None)


class PreferenceTrainer(DPOTrainer):
    """
    [`~trl.DPOTrainer`] whose reference is the teacher, checked to read the same tokens and images as the student.

        L = −log σ(β (c − r)),   c = log π_S(y⁺) − log π_T(y⁺),   r = log π_S(y⁻) − log π_T(y⁻)

    Args:
        model: the student, as in the parent.
        ref_model (`PreTrainedModel`): the teacher.
        args (`PreferenceConfig`, *optional*).
        teacher_processor (`ProcessorMixin`, *optional*): only to check that the tokenizers agree.
        kwargs: as in the parent.

    Raises:
        ValueError: if there is no teacher, or it does not fit the student.
    """

    _tag_names = ["llava-mod", "preference-distillation"]
    _name = "LLaVA-MoD preference distillation"

    def __init__(self, model, ref_model=None, args=None, *, processing_class=None, teacher_processor=None, **kwargs):
        if ref_model is None:
            raise ValueError("Preference distillation needs the teacher as `ref_model`, and got none.")
        args = args or PreferenceConfig()
        super().__init__(model, ref_model, args=args, processing_class=processing_class, **kwargs)
        check_teacher(self.model, ref_model, self.processing_class, teacher_processor)

    # TRL's card names no base model and another task; `llava-mod publish` writes ours, from measured results.
    def create_model_card(self, *args, **kwargs):
        pass
