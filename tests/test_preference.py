"""The preference trainer: loss and raw gradients against the formula on full logits, with the teacher as reference."""

import copy

import pytest
import torch
from ddp_gradients import RUN, assert_gradients_close, raw_gradients, rows, sharpened
from torch.nn import functional as F

from llava_mod_hf import PreferenceConfig, PreferenceTrainer

BETA = 0.5


@pytest.fixture
def models(make_student):
    """`models(moe_layers)`: a new student and a dense teacher of other weights."""

    def make(moe_layers=(0, 2)):
        return sharpened(make_student(moe_layers=moe_layers, seed=0)), sharpened(make_student(moe_layers=[], seed=1))

    return make


@pytest.fixture
def trainer_of(processor, tmp_path):
    def make(student, teacher, *, batch=4, accumulation=1, processor=processor, **args):
        arguments = {key: args.pop(key) for key in ("teacher_processor",) if key in args}
        config = PreferenceConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            **{**RUN, "beta": BETA, "router_aux_loss_coef": 0.0, **args},
        )
        return PreferenceTrainer(
            student, teacher, config, train_dataset=rows("preferences"), processing_class=processor, **arguments
        )

    return make


def log_probabilities(model, batch):
    """Summed over the response, per sequence, from the logits of every position."""
    inputs = {name: value for name, value in batch.items() if name != "completion_mask"}
    log_probs = model(**inputs).logits[:, :-1].double().log_softmax(-1)
    ids, mask = batch["input_ids"][:, 1:], batch["completion_mask"][:, 1:]
    sums = []
    for row in range(len(ids)):
        positions = mask[row].nonzero().flatten().tolist()
        sums.append(sum(log_probs[row, position, ids[row, position]] for position in positions))
    return torch.stack(sums)


def explicit_loss(student, teacher, batch):
    """Mean of −log σ(β (c − r)); the first half of a batch are the chosen responses, the second the rejected."""
    with torch.no_grad():
        reference = log_probabilities(teacher, batch)
    chosen, rejected = (log_probabilities(student, batch) - reference).chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


@pytest.mark.parametrize("moe_layers", [(), (0, 2)], ids=["dense", "sparse"])
def test_loss_and_gradients_are_the_formulas_for_every_split(models, trainer_of, moe_layers):
    expected = None
    for batch, accumulation in ((4, 1), (1, 4)):
        student, teacher = models(moe_layers)
        trainer = trainer_of(student, teacher, batch=batch, accumulation=accumulation)
        if expected is None:
            examples = [trainer.train_dataset[i] for i in range(4)]
            loss = explicit_loss(student, teacher, trainer.data_collator(examples))
            assert abs(loss.item() - torch.tensor(2.0).log().item()) > 0.01, "as much as without any preference"
            loss.backward()
            expected = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
            student.zero_grad()
        found = raw_gradients(trainer)
        assert_gradients_close(found, expected)
        assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_beta_of_the_paper_is_the_default(tmp_path):
    args = PreferenceConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    assert args.beta == 0.1
    assert args.loss_type == ["sigmoid"]


def test_router_aux_is_added(models, trainer_of):
    losses = {}
    for coef in (0.0, 1.0):
        trainer = trainer_of(*models(), router_aux_loss_coef=coef)
        trainer.train()
        losses[coef] = trainer.state.log_history[0]
    aux = losses[1.0]["aux_loss"]
    assert aux > 0.5
    assert losses[1.0]["loss"] - losses[0.0]["loss"] == pytest.approx(aux, rel=1e-4)


def test_teacher_is_not_trained(models, trainer_of):
    student, teacher = models()
    before, start = copy.deepcopy(teacher.state_dict()), copy.deepcopy(student.state_dict())
    trainer_of(student, teacher, learning_rate=0.01).train()
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())
    assert not all(torch.equal(value, start[name]) for name, value in student.state_dict().items())


def test_no_teacher_is_refused(models, trainer_of):
    with pytest.raises(ValueError, match="ref_model"):
        trainer_of(models()[0], None)


def test_a_teacher_of_another_vocabulary_is_refused(models, trainer_of):
    student, teacher = models()
    size = teacher.config.text_config.vocab_size
    teacher.resize_token_embeddings(size + 8)
    with pytest.raises(ValueError, match=rf"{size + 8} entries and the student's {size}"):
        trainer_of(student, teacher)


def test_a_teacher_of_another_tokenizer_is_refused(models, trainer_of, processor):
    other = copy.deepcopy(processor)
    other.tokenizer.add_tokens(["<|other|>"])
    with pytest.raises(ValueError, match=r"first at token '<\|other\|>'"):
        trainer_of(*models(), teacher_processor=other)


def test_a_student_given_by_name_is_checked_too(models, trainer_of, processor, tmp_path):
    student, teacher = models()
    student.save_pretrained(tmp_path / "student")
    processor.save_pretrained(tmp_path / "student")
    teacher.resize_token_embeddings(teacher.config.text_config.vocab_size + 8)
    with pytest.raises(ValueError, match="vocabulary"):
        trainer_of(str(tmp_path / "student"), teacher, processor=None)
