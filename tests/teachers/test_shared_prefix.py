"""Both responses of a pair in one sequence: as two sequences, in float64, to the last digits."""

import logging

import pytest
import torch
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head

from helpers import tiny
from helpers.ddp_gradients import rows, sharpened
from helpers.preference_trainers import uneven
from llava_mod_hf.model.modeling_llava_mod import project
from llava_mod_hf.model.moe_llava_mod import router_losses
from llava_mod_hf.teachers import shared_prefix
from llava_mod_hf.teachers.reference_model import pair_collator
from llava_mod_hf.teachers.shared_prefix import SharedPrefix, cannot_share, pack_pairs, sharing
from llava_mod_hf.training.noted_model import NotedModel

FIELDS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def batch_of(processor, *, images=True):
    examples = [dict(row) for row in uneven(rows("preferences"))]
    examples[1]["prompt"] = [{**each, "content": "And then, " + each["content"]} for each in examples[1]["prompt"]]
    if not images:
        examples = [{**row, "images": []} for row in examples]
    batch = dict(pair_collator(processor)(examples))
    mask = batch.pop("completion_mask")
    lengths = mask.sum(1).chunk(2)
    assert (lengths[0] != lengths[1]).any() and len(set(batch["attention_mask"].sum(1).tolist())) > 2
    labels = batch["input_ids"].masked_fill(mask == 0, -100)
    batch |= {"pixel_values": batch["pixel_values"].double()} if images else {}
    return {**batch, "labels": labels, "fused_lm_head": True}


def student_of(tokenizer, text_model_type="llama", attention="sdpa"):
    model = sharpened(tiny.make_student(tokenizer, (0, 2), text_model_type)).double()
    if attention == "eager":
        model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")  # the grouped product has no float64
    add_fused_lm_head(model, outputs=FIELDS)
    return model


def plain_head(model):
    """What TRL's fused head computes, which does so in float32: here in float64, from all logits."""

    def call(labels=None, shift_labels=None, fused_lm_head=True, **inputs):
        outputs = model.base_model(**inputs)
        hidden_states = outputs.last_hidden_state if shift_labels is not None else outputs.last_hidden_state[:, :-1]
        labels = labels[:, 1:] if shift_labels is None else shift_labels
        logits = project(hidden_states, model.lm_head, model.config.get_text_config())
        log_probs = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        return FusedCausalLMOutput(log_probs=log_probs.masked_fill(labels == -100, 0))

    return call


def tokens_read(model, call):
    """What a call returns, and the shape of what the language model read."""
    shapes = []
    hook = model.base_model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    try:
        found = call()
    finally:
        hook.remove()
    (shape,) = shapes
    return found, shape


@pytest.fixture
def float64(monkeypatch):
    """Norms, softmax and router compute in float32, where a difference of 1e-16 may round to one of 1e-7: not here."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.double)
    yield
    torch.set_default_dtype(torch.float)


@pytest.mark.parametrize("images", [True, False], ids=["images", "text"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("text_model_type", ["llama", "qwen2", "gemma2"])
def test_log_probabilities_and_gradients_are_those_of_two_sequences(
    tokenizer, processor, text_model_type, attention, images, float64
):
    model, batch = student_of(tokenizer, text_model_type, attention), batch_of(processor, images=images)
    text_config, found = model.config.get_text_config(), []
    text_config.router_z_loss_coef = 0.1
    pairs, length = len(batch["labels"]) // 2, batch["labels"].shape[1]
    prompts = ((batch["labels"] == -100) & (batch["attention_mask"] == 1)).sum(1)[:pairs]
    packed = prompts + sum((batch["labels"] != -100).sum(1).chunk(2))
    weights = torch.randn(2 * pairs, length - 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    head = plain_head(model)
    for called, shape in ((head, (2 * pairs, length)), (SharedPrefix(head, model), (pairs, int(packed.max())))):
        noted = NotedModel(called, model.base_model, text_config)
        outputs, read = tokens_read(model, lambda noted=noted: noted(**batch, output_router_logits=True))
        assert read == shape
        ((outputs.log_probs * weights).sum() + outputs.aux_loss + noted.z_loss).backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        found.append((outputs, noted.z_loss, gradients))
    (expected, expected_z, expected_gradients), (outputs, z_loss, gradients) = found
    assert expected.log_probs.abs().max() > 1
    torch.testing.assert_close(outputs.log_probs, expected.log_probs, rtol=1e-12, atol=1e-12)
    # the router's losses are computed with float32 weights of tokens
    torch.testing.assert_close(outputs.aux_loss, expected.aux_loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(z_loss, expected_z, rtol=1e-12, atol=0)
    assert gradients.keys() == expected_gradients.keys()
    assert any("gate" in name for name in gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("aux", [True, False])
def test_what_trl_logs_is_the_same(tokenizer, processor, aux):
    model, batch = student_of(tokenizer), batch_of(processor)
    expected = model(**batch, output_router_logits=aux)
    outputs = SharedPrefix(model, model)(**batch, output_router_logits=aux)
    for name in FIELDS:
        torch.testing.assert_close(outputs[name], expected[name], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(outputs.label_mask, expected.label_mask)
    assert (outputs.aux_loss is None) == (not aux)
    for value, of_two in ((outputs.loss, expected.loss), (outputs.aux_loss, expected.aux_loss)):
        assert value is None or value.item() == pytest.approx(of_two.item(), rel=1e-5)


def test_the_vision_tower_sees_an_image_once(tokenizer, processor):
    model, batch, seen = student_of(tokenizer), batch_of(processor), []
    model.base_model.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len((*args, *kwargs.values())[0])), with_kwargs=True
    )
    SharedPrefix(model, model)(**batch)
    assert seen == [len(batch["labels"]) // 2]


def test_the_head_reads_what_predicts_a_response(tokenizer, processor):
    model, batch, seen = student_of(tokenizer), batch_of(processor), []
    model.base_model.register_forward_hook(lambda module, args, outputs: seen.append(outputs.last_hidden_state.shape))
    outputs = SharedPrefix(model, model)(**batch)
    assert seen[0][:2] == (len(batch["labels"]), (batch["labels"] != -100).sum(1).max())
    assert (outputs.log_probs != 0).sum() == (batch["labels"] != -100).sum() == outputs.label_mask.sum()


def test_what_cannot_be_put_together_is_read_row_by_row(tokenizer, processor):
    model, batch = student_of(tokenizer), batch_of(processor)
    expected = model(**batch).log_probs
    shared, rows_read = SharedPrefix(model, model), batch["labels"].shape

    def read(**changes):
        return tokens_read(model, lambda: shared(**{**batch, **changes}))[1]

    assert read() != rows_read
    other = batch["input_ids"].clone()
    column = (other[0] == tokenizer.encode("color")[0]).nonzero()
    other[0, column[0] if len(column) else 20] = tokenizer.encode(" red")[0]
    assert read(input_ids=other) == rows_read, "prompts differ"
    pixels = batch["pixel_values"].clone()
    pixels[0] += 1
    assert read(pixel_values=pixels) == rows_read, "images differ"
    assert read(labels=batch["input_ids"]) == rows_read, "no prompt"
    shared.window = rows_read[1]
    assert read() != rows_read
    shared.window -= 1
    outputs, shape = tokens_read(model, lambda: shared(**batch))
    assert shape == rows_read, "longer than what a layer sees"
    torch.testing.assert_close(outputs.log_probs, expected)


def test_odd_batches_and_holes_are_not_pairs():
    ids, ones = torch.ones(2, 4, dtype=torch.long), torch.ones(2, 4, dtype=torch.long)
    response = torch.tensor([[0, 0, 1, 1]] * 2)
    assert pack_pairs(ids, ones, response) is not None
    assert pack_pairs(ids[:1], ones[:1], response[:1]) is None
    assert pack_pairs(ids, torch.tensor([[0, 1, 1, 1]] * 2), response) is None
    assert pack_pairs(ids, ones, torch.tensor([[0, 1, 0, 1]] * 2)) is None
    assert pack_pairs(ids, ones, torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]])) is None


def test_a_response_does_not_see_the_other():
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 9, 0]])
    packed = pack_pairs(ids, torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]), torch.tensor([[0, 0, 1, 1], [0, 0, 1, 0]]))
    assert packed.input_ids.tolist() == [[5, 6, 7, 8, 9]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 2]]
    assert packed.may_attend[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],
    ]
    assert packed.labels.tolist() == [[7, 8], [9, -100]]
    assert packed.predictors.tolist() == [[1, 2], [1, 4]]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"_attn_implementation_internal": "flash_attention_2"}, "`flash_attention_2` attention takes no mask"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "layers of linear_attention"),
    ],
)
def test_a_model_that_cannot_says_why_once(tokenizer, changes, reason, caplog):
    model = tiny.make_student(tokenizer)
    assert cannot_share(model) is None
    for name, value in changes.items():
        setattr(model.config.get_text_config(), name, value)
    assert reason in cannot_share(model)
    shared_prefix._say.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert sharing(model, model) is sharing(model, model) is model
    assert caplog.text.count(reason) == 1


def test_the_routers_losses_are_of_the_rows(tokenizer, processor):
    """A prompt counts for both of its responses, as it does in two sequences."""
    model, batch = student_of(tokenizer), batch_of(processor)
    noted = NotedModel(SharedPrefix(model, model), model.base_model, model.config.get_text_config())
    aux = noted(**batch, output_router_logits=True).aux_loss
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    logits = model.base_model(**inputs, output_router_logits=True).router_logits
    expected, _ = router_losses(logits, model.config.get_text_config(), batch["attention_mask"])
    assert aux.item() == pytest.approx(expected.item(), rel=1e-12)
