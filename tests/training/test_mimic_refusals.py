"""What the mimic trainer refuses, and which parts it trains."""

import copy

import pytest
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration, MixtralConfig

from llava_mod_hf import MimicConfig
from llava_mod_hf.training.trainable import set_trainable


def test_kl_without_a_teacher_is_refused(models, trainer_of):
    with pytest.raises(ValueError, match="teacher_model"):
        trainer_of(models()[0], None)


def test_a_teacher_of_another_vocabulary_is_refused(models, trainer_of):
    student, teacher = models()
    size = teacher.config.text_config.vocab_size
    teacher.resize_token_embeddings(size + 8)
    with pytest.raises(ValueError, match=rf"{size + 8} entries and the student's {size}"):
        trainer_of(student, teacher)


def swapped_tokens(processor, first, second):
    """A processor whose tokenizer has the same size, and two tokens in each other's place."""
    other = copy.deepcopy(processor)
    backend = other.tokenizer.backend_tokenizer.to_str()
    vocabulary = processor.tokenizer.get_vocab()
    one, two = vocabulary[first], vocabulary[second]
    swapped = backend.replace(f'"{first}":{one}', f'"{first}":{two}').replace(f'"{second}":{two}', f'"{second}":{one}')
    assert swapped != backend
    other.tokenizer._tokenizer = type(processor.tokenizer.backend_tokenizer).from_str(swapped)
    return other


def test_a_teacher_of_another_tokenizer_is_refused(models, trainer_of, processor):
    first, second = processor.tokenizer.convert_ids_to_tokens([300, 310])
    with pytest.raises(ValueError, match=f"first at token '{first}'|first at token '{second}'") as error:
        trainer_of(*models(), teacher_processor=swapped_tokens(processor, first, second))
    assert "300" in str(error.value)


def test_a_teacher_of_the_same_tokenizer_is_accepted(models, trainer_of, processor):
    student, teacher = models()
    trainer = trainer_of(student, teacher, teacher_processor=copy.deepcopy(processor))
    assert trainer.teachers[0].model is teacher
    assert trainer.teachers[0].collator is None


@pytest.mark.parametrize("name", ["image_seq_length", "image_token_index"])
def test_a_teacher_with_other_image_tokens_is_refused(models, trainer_of, name):
    student, teacher = models()
    setattr(teacher.config, name, getattr(teacher.config, name) + 1)
    with pytest.raises(ValueError, match=name.replace("index", "id")):
        trainer_of(student, teacher)


@pytest.mark.parametrize(
    "arguments", [{"temperature": 0.0}, {"temperature": -1.0}, {"loss_type": "dft"}, {"label_smoothing_factor": 0.1}]
)
def test_arguments_that_cannot_be_are_refused(tmp_path, arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=name):
        MimicConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **arguments)


def test_default_of_the_trained_parts_is_the_papers(models):
    for moe_layers, part in (((), "language_model"), ((0, 2), "mlp")):
        student, _ = models(moe_layers)
        set_trainable(student, None)
        trained = {name for name, p in student.named_parameters() if p.requires_grad}
        expected = {
            name
            for name, _ in student.named_parameters()
            if "multi_modal_projector" in name or ("language_model" in name and part in name)
        }
        assert trained == expected
        assert any("multi_modal_projector" in name for name in trained)


@pytest.mark.parametrize("modules", [["experts"], ["adaptor", "everything"], []])
def test_unknown_parts_are_refused(models, modules):
    with pytest.raises(ValueError, match="vision_tower, adaptor, language_model, ffn"):
        set_trainable(models()[0], modules)


def test_a_step_of_the_sparse_stage_trains_ffns_and_adaptor_alone(models, trainer_of):
    student, teacher = models()
    set_trainable(student, None)
    before = copy.deepcopy(student.state_dict())
    trainer_of(student, teacher, learning_rate=0.01, router_aux_loss_coef=0.01).train()
    changed = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    trained = ("mlp.gate.weight", "experts.gate_up_proj", "experts.down_proj", "multi_modal_projector.linear_1.weight")
    for name in trained:
        assert any(name in other for other in changed), name
    for name in before:
        if any(part in name for part in ("vision_tower", "self_attn", "embed_tokens", "lm_head", "norm")):
            assert name not in changed


def test_a_mixture_of_experts_of_another_kind_is_refused_before_the_first_step(models, trainer_of, processor):
    teacher = models()[1]
    text_config = MixtralConfig(
        vocab_size=teacher.config.text_config.vocab_size,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    names = ("image_token_index", "image_seq_length", "vision_feature_layer", "vision_feature_select_strategy")
    known = {name: value for name, value in teacher.config.to_dict().items() if name in names}
    student = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=teacher.config.vision_config, text_config=text_config, **known)
    )
    with pytest.raises(ValueError, match="LlavaForConditionalGeneration is a mixture of experts"):
        trainer_of(student, teacher, router_aux_loss_coef=0.1)
    trainer_of(student, teacher, router_aux_loss_coef=0.0).train()
