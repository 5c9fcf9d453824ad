"""What a stage is said to hold in memory, against what a step holds, on a CPU, in the recipes' bf16."""

import pytest
import torch
from transformers import LlamaConfig

from llava_mod_hf import LlavaModConfig, LlavaModForConditionalGeneration, MimicConfig, MimicTrainer
from llava_mod_hf.data import scene_rows
from llava_mod_hf.loading import load_model_and_processor
from llava_mod_hf.losses.rows import shift_for_next_token
from llava_mod_hf.training.stage_memory import stage_memory


def student_of(teacher, width, layers):
    own = teacher.config.get_text_config()
    text_config = LlamaConfig(
        vocab_size=own.vocab_size, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=True, pad_token_id=own.pad_token_id,
        eos_token_id=own.eos_token_id,
    )  # fmt: skip
    names = ("image_token_index", "image_seq_length", "vision_feature_layer", "vision_feature_select_strategy")
    fields = {name: getattr(teacher.config, name) for name in names}
    config = LlavaModConfig(
        vision_config=teacher.config.vision_config,
        text_config=text_config,
        moe_layers=list(range(0, layers, 2)),
        **fields,
    )
    return LlavaModForConditionalGeneration(config)


def held(tensors):
    """Bytes of tensors, each storage once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.slow
@pytest.mark.parametrize(("width", "layers", "batch"), [(64, 4, 8), (192, 6, 16), (384, 8, 16)])
def test_a_step_holds_what_is_said(tmp_path, width, layers, batch):
    teacher, processor = load_model_and_processor("embedded:scenes-teacher")
    student = student_of(teacher, width, layers)
    args = MimicConfig(
        str(tmp_path), per_device_train_batch_size=batch, max_steps=1, use_cpu=True, bf16=True, report_to="none",
        save_strategy="no", gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False},
        disable_tqdm=True, max_length=512,
    )  # fmt: skip
    rows = scene_rows.load("mixture", "train", 0, {"rows": batch})
    trainer = MimicTrainer(student, teacher, args, train_dataset=rows, processing_class=processor)
    trainer.train()
    batch_ = next(iter(trainer.get_train_dataloader()))
    supervised = len(shift_for_next_token(batch_["labels"])[1])
    images = int((batch_["input_ids"] == student.config.image_token_index).sum())
    said = stage_memory(student, tokens=batch_["input_ids"].numel(), image_tokens=images, rows=supervised)
    weights, saved = {p.untyped_storage().data_ptr() for m in (student, teacher) for p in m.parameters()}, []

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            saved.append(tensor)
        return tensor

    trainer.current_gradient_accumulation_steps = 1
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = trainer.compute_loss(trainer.model.train(), batch_)
    assert held(saved) == pytest.approx(said["kept"], rel=0.2)
    loss.backward()
    parameters = {p for p in student.parameters()}
    state = [v for values in trainer.optimizer.state.values() for v in values.values() if torch.is_tensor(v) and v.ndim]
    gradients = [p.grad for p in parameters if p.grad is not None]
    assert held(parameters) == pytest.approx(4 * said["total"], rel=0.1)
    assert held(gradients) == pytest.approx(4 * said["trained"], rel=0.1)
    assert held(state) == pytest.approx(8 * said["trained"], rel=0.1)
    assert said["whole"] == held(parameters) + 14 * said["trained"] + said["kept"]
