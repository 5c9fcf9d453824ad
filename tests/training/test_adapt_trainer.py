"""The adaptor stage of a sparse student: its router losses are those of the mimic stage."""

import pytest
import torch

from helpers.ddp_gradients import EVERYTHING, RUN, assert_gradients_close, raw_gradients, rows, sharpened
from helpers.oracles import router_aux_loss
from llava_mod_hf.training.adapt_trainer import AdaptConfig, AdaptTrainer


@pytest.fixture
def adapt(make_student, processor, tmp_path):
    """`adapt(aux, z)`: a trainer of two micro-batches with the two coefficients."""

    def make(aux, z=0.0):
        student = sharpened(make_student(moe_layers=(0, 2)))
        student.config.get_text_config().router_z_loss_coef = z
        config = AdaptConfig(
            str(tmp_path),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            train_modules=EVERYTHING,
            router_aux_loss_coef=aux,
            **RUN,
        )
        return AdaptTrainer(student, config, train_dataset=rows(), processing_class=processor)

    return make


def router_gradients(trainer):
    """Mean over the micro-batches of the load balancing and of the z-loss, and their gradients, written out."""
    found = []
    for indices in ((0, 1), (2, 3)):
        inputs = trainer.data_collator([trainer.train_dataset[i] for i in indices])
        inputs.pop("labels")
        mask = inputs["attention_mask"]
        logits = trainer.model(**inputs, output_router_logits=True).router_logits
        z = sum(layer[mask.flatten().bool()].logsumexp(-1).square().mean() for layer in logits)
        found.append((router_aux_loss(logits, attention_mask=mask), z))
    values = [sum(column) / len(found) for column in zip(*found, strict=True)]
    gradients = []
    for value in values:
        trainer.model.zero_grad()
        value.backward(retain_graph=True)
        gradients.append({n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None})
    trainer.model.zero_grad()
    return [value.item() for value in values], gradients


@pytest.mark.parametrize(("aux", "z"), [(3.0, 0.0), (0.0, 0.5), (3.0, 0.5)])
def test_router_losses_are_those_of_the_mimic_stage(adapt, aux, z):
    (aux_loss, z_loss), (aux_gradient, z_gradient) = router_gradients(adapt(aux, z))
    without, trainer = raw_gradients(adapt(0.0)), adapt(aux, z)
    found = raw_gradients(trainer)
    added = {name: found[name] - without.get(name, torch.zeros(())) for name in aux_gradient}
    assert_gradients_close(added, {name: aux * aux_gradient[name] + z * z_gradient[name] for name in aux_gradient})
    logs = trainer.state.log_history[0]
    assert logs.get("aux_loss") == (pytest.approx(aux_loss, rel=1e-5) if aux else None)
    assert logs.get("z_loss") == (pytest.approx(z_loss, rel=1e-5) if z else None)
