"""Trainers of pairs whose image and prompt are computed once."""

import pytest

from helpers.ddp_gradients import assert_gradients_close, raw_gradients, rows
from helpers.preference_trainer_cases import PAIRS
from helpers.preference_trainers import uneven


@pytest.mark.parametrize("reference", ["teacher", "self"])
def test_a_shared_prefix_changes_the_work_and_not_the_gradients(models, pair_trainer_of, reference):
    """Of student and reference, with the router's losses, uneven pairs, and losses that weigh each token."""
    losses = {"loss_type": ["sigmoid", "sigmoid_norm"], "loss_weights": [1.0, 0.5], "use_weighting": True}
    found, read, logs = {}, {}, {}
    for share in (True, False):
        student, teacher = models((0, 2))
        student.config.get_text_config().router_z_loss_coef = 0.1
        trainer = pair_trainer_of(
            student, teacher if reference == "teacher" else None, reference=reference, share_prefix=share,
            dataset=uneven(rows("preferences")), router_aux_loss_coef=0.5, **losses,
        )  # fmt: skip
        read[share] = {"student": [], "reference": []}
        for name, model in (("student", trainer.model), ("reference", trainer.ref_model)):
            model.base_model.language_model.register_forward_pre_hook(
                lambda module, args, kwargs, shapes=read[share][name]: shapes.append(kwargs["inputs_embeds"].shape[:2]),
                with_kwargs=True,
            )
        found[share] = raw_gradients(trainer)
        logs[share] = trainer.state.log_history[0]
    assert_gradients_close(found[True], found[False])
    for name in ("student", "reference"):
        ((rows_read, packed),), ((both, length),) = read[True][name], read[False][name]
        assert (rows_read, both) == (PAIRS, 2 * PAIRS)
        assert length < packed < 2 * length
    for name, value in logs[False].items():
        if name not in {"step_time", "train_runtime", "epoch", "tokens_per_second"} and isinstance(value, float):
            assert logs[True][name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
