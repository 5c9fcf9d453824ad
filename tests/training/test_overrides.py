"""What the trainers override in their parents, and what they call of them, by its parameters."""

import inspect

import pytest
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.trainer_pt_utils import get_length_grouped_indices
from trl import DPOTrainer, SFTTrainer, get_peft_config
from trl.models import prepare_deepspeed
from trl.models.utils import _ForwardRedirection, unwrap_model_for_generation
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling
from trl.trainer.utils import maybe_gather_lm_head_ctx

from llava_mod_hf import MimicTrainer, PreferenceTrainer
from llava_mod_hf.data.conversations import AnswersCollator
from llava_mod_hf.data.grouping import GroupedBatches
from llava_mod_hf.training.adapt_trainer import AdaptTrainer
from llava_mod_hf.training.finite_steps import FiniteSteps
from llava_mod_hf.training.logs import KeepsMetrics
from llava_mod_hf.training.progress import Bar, Clock, Lines, ShowsProgress, StepTimer
from llava_mod_hf.training.router_health import WatchesRouters
from llava_mod_hf.training.rows_read import CountsRows, RowsRead
from llava_mod_hf.training.run_lines import BeginsLines
from llava_mod_hf.training.safe_run import EndAtLastStep, SafeRun
from llava_mod_hf.training.validation import Validates

INIT = (
    "self model {} args data_collator train_dataset eval_dataset processing_class {} compute_metrics callbacks "
    "optimizers {} quantization_config peft_config {}"
)
SFT_INIT = INIT.format(
    "", "compute_loss_func", "optimizer_cls_and_kwargs preprocess_logits_for_metrics", "formatting_func"
)
CARD = "self model_name dataset_name tags"
CALLBACK = "self args state control kwargs"
# our class → its parent, and the parent's parameters of each method that ours overrides
OVERRIDDEN = {
    AdaptTrainer: (
        SFTTrainer,
        {"__init__": SFT_INIT, "compute_loss": "self model inputs return_outputs num_items_in_batch"},
    ),
    AnswersCollator: (
        DataCollatorForVisionLanguageModeling,
        {"torch_call": "self examples", "_collate_prompt_completion": "self examples"},
    ),
    KeepsMetrics: (Trainer, {"log": "self logs start_time"}),
    MimicTrainer: (
        SFTTrainer,
        {
            "__init__": SFT_INIT,
            "get_batch_samples": "self epoch_iterator num_batches device",
            "compute_loss": "self model inputs return_outputs num_items_in_batch",
            "log": "self logs start_time",
        },
    ),
    PreferenceTrainer: (
        DPOTrainer,
        {
            "__init__": INIT.format("ref_model", "", "", ""),
            "_compute_loss": "self model inputs return_outputs",
        },
    ),
    SafeRun: (
        Trainer,
        {
            "train": "self resume_from_checkpoint trial ignore_keys_for_eval",
            "training_step": "self model inputs num_items_in_batch",
            "save_model": "self output_dir _internal_call",
            "_save": "self output_dir state_dict",
            "_save_checkpoint": "self model trial",
            "init_hf_repo": "self token private",
            "_push_from_checkpoint": "self checkpoint_folder",
            "push_to_hub": "self commit_message blocking token revision private kwargs",
            "create_model_card": "self language license tags model_name finetuned_from tasks dataset_tags dataset "
            "dataset_args",
        },
    ),
    EndAtLastStep: (TrainerCallback, {"on_epoch_begin": CALLBACK}),
    FiniteSteps: (TrainerCallback, {"on_step_end": CALLBACK}),
    CountsRows: (
        Trainer,
        {"get_train_dataloader": "self", "get_batch_samples": "self epoch_iterator num_batches device"},
    ),
    RowsRead: (TrainerCallback, {"on_train_begin": CALLBACK, "on_step_end": CALLBACK}),
    GroupedBatches: (
        Trainer,
        {"_get_train_sampler": "self train_dataset", "_get_eval_sampler": "self eval_dataset"},
    ),
    Bar: (ProgressCallback, {"on_train_begin": CALLBACK, "on_log": "self args state control logs kwargs"}),
    Lines: (
        PrinterCallback,
        {"on_train_begin": CALLBACK, "on_log": "self args state control logs kwargs"},
    ),
    Clock: (
        TrainerCallback,
        {"on_train_begin": CALLBACK, "on_step_end": CALLBACK, "on_evaluate": CALLBACK, "on_save": CALLBACK},
    ),
    ShowsProgress: (Trainer, {"log": "self logs start_time"}),
    WatchesRouters: (Trainer, {"log": "self logs start_time"}),
    BeginsLines: (TrainerCallback, {"on_train_begin": CALLBACK}),
    Validates: (
        Trainer,
        {
            "evaluation_loop": "self dataloader description prediction_loss_only ignore_keys metric_key_prefix",
        },
    ),
    StepTimer: (TrainerCallback, {"on_train_begin": CALLBACK, "on_step_end": CALLBACK}),
}
CALLED = {
    SFTTrainer._get_num_items_in_batch: "self batch_samples device",
    SFTTrainer.prediction_step: "self model inputs prediction_loss_only ignore_keys",
    SFTTrainer.training_step: "self args kwargs",
    SFTTrainer.get_tp_size: "self",
    SFTTrainer._save_checkpoint: "self model trial",
    SFTTrainer._get_output_dir: "self trial",
    SFTTrainer._finish_current_push: "self",
    SFTTrainer._load_best_model: "self",
    SFTTrainer.init_hf_repo: "self token private",
    DPOTrainer.compute_ref_log_probs: "self model inputs",
    SFTTrainer._set_signature_columns_if_needed: "self",
    DPOTrainer._set_signature_columns_if_needed: "self",
    _ForwardRedirection.__call__: "self wrapper_module original_module method args kwargs",
    Trainer.get_optimizer_cls_and_kwargs: "args model",
    get_peft_config: "model_args",
    prepare_deepspeed: "model accelerator",
    maybe_gather_lm_head_ctx: "params",
    unwrap_model_for_generation: "model accelerator gather_deepspeed3_params generation_kwargs "
    "gradient_checkpointing_kwargs",
    get_length_grouped_indices: "lengths batch_size mega_batch_mult generator",
}


def parameters(function):
    return list(inspect.signature(function).parameters)


@pytest.mark.parametrize("ours", OVERRIDDEN, ids=lambda ours: ours.__name__)
def test_a_parents_method_takes_what_ours_was_written_for(ours):
    parent, methods = OVERRIDDEN[ours]
    defined = {name for name, value in vars(ours).items() if inspect.isfunction(value)}
    assert {name for name in defined if hasattr(parent, name) and name != "__init__"} == set(methods) - {"__init__"}
    for name, expected in methods.items():
        assert parameters(getattr(parent, name)) == expected.split(), name


@pytest.mark.parametrize("ours", OVERRIDDEN, ids=lambda ours: ours.__name__)
def test_ours_can_be_called_as_the_parents(ours):
    parent, methods = OVERRIDDEN[ours]
    for name in set(methods) - {"__init__"}:
        expected, *own = (list(inspect.signature(getattr(owner, name)).parameters.values()) for owner in (parent, ours))
        takes_all = any(p.kind == inspect.Parameter.VAR_POSITIONAL for p in own[0])
        assert takes_all or [p.name for p in own[0]][: len(expected)] == [p.name for p in expected], name


@pytest.mark.parametrize("function", CALLED, ids=lambda function: function.__qualname__)
def test_what_is_called_takes_what_it_is_given(function):
    assert parameters(function) == CALLED[function].split()


def test_the_parents_loss_is_where_ours_takes_its_place():
    # the trainer calls `compute_loss`, whose own result is the loss; DPO's hands on to `_compute_loss`
    assert "self.compute_loss(" in inspect.getsource(Trainer.training_step)
    assert "self._compute_loss(model, inputs, return_outputs)" in inspect.getsource(DPOTrainer.compute_loss)
    assert all("self._metrics[mode]" in inspect.getsource(parent.log) for parent in (SFTTrainer, DPOTrainer))
