"""Adaptor initialisation: next-token cross-entropy, only the adaptor is trained (paper, stage 1)."""

from peft import PeftModel
from trl import SFTTrainer

from llava_mod_hf.data.grouping import GroupedBatches
from llava_mod_hf.students.generation import prepare_generation
from llava_mod_hf.training.adapt_config import AdaptConfig
from llava_mod_hf.training.cached_features import use_vision_cache
from llava_mod_hf.training.given import given
from llava_mod_hf.training.logs import KeepsMetrics
from llava_mod_hf.training.noted_model import NotedModel
from llava_mod_hf.training.safe_run import SafeRun
from llava_mod_hf.training.trainable import train_only
from llava_mod_hf.training.validation import Validates
from llava_mod_hf.training.watching import Watched
from llava_mod_hf.training.whole_conversations import WholeConversations


class AdaptTrainer(KeepsMetrics, GroupedBatches, Validates, Watched, WholeConversations, SafeRun, SFTTrainer):
    """
    [`~trl.SFTTrainer`] that trains the adaptor alone, or what [`AdaptConfig`] names, and whose
    `train_sampling_strategy: group_by_length` knows rows with images. A sparse student's router losses are those of
    [`~llava_mod_hf.MimicTrainer`].
    """

    def __init__(self, model, args=None, **kwargs):
        args = args or AdaptConfig()
        kwargs = given(args, AdaptConfig, model, **kwargs)
        super().__init__(model, args, **kwargs)
        train_only(self.model, args.train_modules, default=["adaptor"])
        prepare_generation(self.model, self.processing_class)
        use_vision_cache(self)

    # The parent's load balancing is transformers' form, and it knows no z-loss.
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        text_config = self.model.config.get_text_config()
        if not hasattr(text_config, "router_aux_loss_type"):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        student = self.accelerator.unwrap_model(self.model)
        student = student.get_base_model() if isinstance(student, PeftModel) else student
        noted = NotedModel(model, student.base_model, text_config)
        found = super().compute_loss(noted, inputs, return_outputs, num_items_in_batch)
        loss, *outputs = found if return_outputs else (found,)
        if noted.router is not None:
            self.note_routers(*noted.router)
        if noted.z_loss is not None:
            steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            loss = loss + text_config.router_z_loss_coef * noted.z_loss / steps
            z_loss = self.accelerator.gather(noted.z_loss.detach()).mean().item()
            self._metrics["train" if self.model.training else "eval"]["z_loss"].append(z_loss)
        return (loss, *outputs) if return_outputs else loss
