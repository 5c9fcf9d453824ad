"""What the trainers do in Python as on the command line: stop where nothing is finite, resume, write no token."""

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback

from helpers.ddp_gradients import RUN, mimic_trainer, rows, sharpened
from helpers.leaks import find_leaks, private_words
from helpers.preference_trainers import preference_trainer
from helpers.stages import StopsAt
from helpers.trainers import ONE_FAST
from llava_mod_hf.training.adapt_config import AdaptConfig
from llava_mod_hf.training.adapt_trainer import AdaptTrainer
from llava_mod_hf.training.finite_steps import SKIPPED_IN_A_ROW, FiniteSteps

KINDS = ("adapt", "mimic", "prefer")
SAVING = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
TRAINERS = {"mimic": mimic_trainer, "prefer": preference_trainer}
SHARED = {"safetensors", "json", "jinja", "py", "gitattributes"}
LORA = {"r": 2, "target_modules": r".*language_model.*\.(q_proj|v_proj)"}


@pytest.fixture
def trainer_of(make_student, processor, tmp_path):
    """`trainer_of(kind, **arguments)`: a trainer in Python, of a new dense student, in `tmp_path / "run"`."""

    def make(kind, **args):
        student, folder = sharpened(make_student(moe_layers=[])), tmp_path / "run"
        if kind == "adapt":
            own = {name: args.pop(name) for name in ("peft_config", "callbacks") if name in args}
            args = AdaptConfig(output_dir=str(folder), per_device_train_batch_size=4, **{**RUN, **args})
            return AdaptTrainer(student, args, train_dataset=rows(), processing_class=processor, **own)
        trainer = mimic_trainer if kind == "mimic" else preference_trainer
        return trainer(
            student, make_student(moe_layers=[], seed=1), processor, folder, **{"train_modules": None, **args}
        )

    return make


class Breaks(TrainerCallback):
    """Makes a gradient, or a weight that is not trained, not a number."""

    def __init__(self, what):
        self.what = what

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.what == "gradient" and state.global_step == 1:
            next(p for p in model.parameters() if p.grad is not None).grad.view(-1)[0] = float("nan")

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if self.what == "frozen" and state.global_step == 1:
            frozen = next(p for name, p in model.named_parameters() if "vision_tower" in name)
            frozen.data.fill_(float("inf"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("what", "told"), [("gradient", "trained weights"), ("frozen", "")])
def test_a_run_stops_at_the_step_that_is_not_finite(trainer_of, tmp_path, kind, what, told):
    trainer = trainer_of(kind, **SAVING, callbacks=[Breaks(what)])
    with pytest.raises(ValueError, match=rf"stopped at step 2: .*{told} held values that are not finite"):
        trainer.train()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-1"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_max_length_that_cuts_through_an_image_is_refused_before_the_first_step(trainer_of, kind):
    with pytest.raises(ValueError, match=r"`max_length` is 6, which cuts through the images of \d of the 4 rows"):
        trainer_of(kind, max_length=6)


def stub(*, skipped, weight=1.0):
    accelerator = SimpleNamespace(optimizer_step_was_skipped=skipped, device="cpu", reduce=lambda tensor: tensor)
    model = nn.Linear(2, 2)
    model.weight.data[0, 0] = weight
    return SimpleNamespace(accelerator=accelerator, model=model)


def steps(callback, losses):
    for number, loss in enumerate(losses, 1):
        callback.note(torch.tensor(1.0))
        callback.note(torch.tensor(loss))
        callback.on_step_end(None, SimpleNamespace(global_step=number), None)


def test_steps_that_the_gradient_scaler_skips_do_not_stop_a_run():
    steps(FiniteSteps(stub(skipped=True)), [1.0] * 50)  # gradients too large, of a finite loss
    nan, taken = float("nan"), stub(skipped=True)
    steps(callback := FiniteSteps(taken), [nan] * SKIPPED_IN_A_ROW)
    taken.accelerator.optimizer_step_was_skipped = False
    steps(callback, [1.0])
    taken.accelerator.optimizer_step_was_skipped = True
    steps(callback, [nan] * SKIPPED_IN_A_ROW)
    with pytest.raises(ValueError, match="at step 1: the loss held"):
        steps(callback, [nan])


@pytest.mark.parametrize(
    ("options", "losses"),
    [({"skipped": False}, [1.0, 1.0, float("inf")]), ({"skipped": True, "weight": float("nan")}, [1.0])],
)
def test_a_step_that_was_taken_has_to_be_finite(options, losses):
    with pytest.raises(ValueError, match=f"at step {len(losses)}:"):
        steps(FiniteSteps(stub(**options)), losses)


@pytest.mark.parametrize("kind", ONE_FAST)
def test_training_is_taken_up_in_python(trainer_of, tmp_path, kind):
    with pytest.raises(InterruptedError):
        trainer_of(kind, **SAVING, callbacks=[StopsAt(2)]).train()
    trainer = trainer_of(kind, **SAVING, callbacks=[rest := StopsAt()])
    trainer.train(resume_from_checkpoint=True)
    assert (rest.taken, trainer.state.global_step) == (1, 2)
    last = trainer_of(kind, **SAVING, callbacks=[rest := StopsAt()])
    last.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert (rest.taken, last.state.global_step) == (0, 2)
    weights = last.model.state_dict()
    assert all(weights[name].equal(value) for name, value in trainer.model.state_dict().items())
    with pytest.raises(ValueError, match="`learning_rate` was"):
        trainer_of(kind, **SAVING, learning_rate=0.5).train(resume_from_checkpoint=True)
    (tmp_path / "run" / "checkpoint-2" / "launch.yaml").write_text("processes: 2")
    with pytest.raises(ValueError, match="the number of processes was 2 and is 1"):
        last.train(resume_from_checkpoint=True)
    last.train()
    assert rest.taken == 2  # from the start


def test_a_tied_head_that_was_gathered_is_not_written_beside_the_embeddings(trainer_of, tmp_path, make_student):
    trainer = trainer_of("mimic")
    state = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    tied, source = next(iter(trainer.model.all_tied_weights_keys.items()))
    assert tied in state and source in state
    trainer._save(str(tmp_path / "gathered"), state_dict=state)
    assert load_file(tmp_path / "gathered" / "model.safetensors").keys() == state.keys() - {tied}


@pytest.mark.parametrize("kind", KINDS)
def test_no_token_is_written(trainer_of, tmp_path, kind):
    trainer = trainer_of(kind, **SAVING, hub_token=(token := "hf_" + "x" * 34))
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    assert trainer.args.hub_token == token
    assert len(list(tmp_path.rglob("model.safetensors"))) == 3
    assert find_leaks(tmp_path, [token]) == []
    assert not list(tmp_path.rglob("training_args.bin"))


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("kind", ONE_FAST)
def test_what_is_pushed_is_the_model_alone(trainer_of, hub, tmp_path, monkeypatch, kind, lora):
    words = private_words(monkeypatch, tmp_path, hub.token)
    peft = {"peft_config": LoraConfig(**LORA)} if lora else {}
    trainer = trainer_of(kind, **SAVING, **peft, push_to_hub=True, hub_token=hub.token, hub_model_id="me/student")
    trainer.model.name_or_path = str(tmp_path / "student")
    if lora:
        trainer.model.peft_config["default"].base_model_name_or_path = str(tmp_path / "student")
    (tmp_path / "run" / "runs" / "qzhost").mkdir(parents=True)
    (tmp_path / "run" / "runs" / "qzhost" / "events.out.tfevents").write_text(str(tmp_path))
    trainer.train()
    trainer.push_to_hub()

    repo = hub.repos["me/student"]
    messages = [commit.message for commit in repo.commits()]
    assert messages[-2] == "Training in progress, step 1"
    # the Hub gets no commit without a difference: where step 2 was pushed, the end brings nothing new
    assert messages[:-2] in (["End of training"], ["Training in progress, step 2"])
    weights = "adapter_model.safetensors" if lora else "model.safetensors"
    for commit in repo.commits()[:-1]:
        assert {weights, "processor_config.json", "tokenizer.json"} <= set(commit.files)
        assert {path.rpartition(".")[2] for path in commit.files} <= SHARED
    assert "trainer_state.json" not in repo.commits()[0].files
    assert find_leaks(hub.received(), words) == []
    assert not list((tmp_path / "run").glob(".unfinished*"))


@pytest.mark.parametrize("strategy", ["checkpoint", "all_checkpoints"])
def test_the_state_of_training_is_not_pushed(tmp_path, strategy):
    with pytest.raises(ValueError, match=rf"`hub_strategy` is '{strategy}', which pushes the optimiser's state"):
        AdaptConfig(output_dir=str(tmp_path), use_cpu=True, hub_strategy=strategy)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"hub_tag": "v1"}, "`hub_tag` is 'v1', which does nothing without `push_to_hub`"),
        ({"hub_gated": "auto"}, "`hub_gated` is 'auto', which does nothing without `push_to_hub`"),
        ({"hub_gated": "open", "push_to_hub": True}, "`gated` is 'open': give one of auto, manual"),
        ({"hub_tag": "v1", "hub_revision": "v1", "push_to_hub": True}, "`v1` is given as tag and as branch"),
    ],
)
def test_options_of_a_push_that_nothing_could_do_are_refused(tmp_path, options, told):
    with pytest.raises(ValueError, match=told):
        AdaptConfig(output_dir=str(tmp_path), use_cpu=True, **options)


@pytest.mark.parametrize("kind", ONE_FAST)
def test_a_token_that_may_not_write_is_refused_before_the_run(trainer_of, hub, kind):
    hub.readers.add("hf_reader")
    with pytest.raises(ValueError, match=r"refused to write `me/student` \(HTTP 403\).*that may write there") as caught:
        trainer_of(kind, push_to_hub=True, hub_token="hf_reader", hub_model_id="me/student")
    assert "\n" not in str(caught.value) and not hub.repos


def test_a_push_that_fails_leaves_the_run_and_says_where_it_is(trainer_of, hub, tmp_path):
    trainer = trainer_of("mimic", push_to_hub=True, hub_token=hub.token, hub_model_id="me/student")
    hub.fail["commit"] = "drop"
    with pytest.raises(
        ConnectionError, match=r"could not be pushed to `me/student` \(.*Push again\): it is saved on th"
    ):
        trainer.push_to_hub()
    assert not list((tmp_path / "run").glob(".unfinished*"))
    assert [commit.message for commit in hub.repos["me/student"].commits()] == ["initial commit"]
