"""`llava-mod mimic`: distil the teacher, dense-to-dense or dense-to-sparse."""

from llava_mod_hf.commands.parts import check_experts, upcycle_student
from llava_mod_hf.commands.stage_parts import (
    fit_to_recipe,
    load_eval_rows,
    load_student,
    load_teacher_or_cache,
    refuse_adapter_of_new_student,
)
from llava_mod_hf.data.load import load_rows
from llava_mod_hf.teachers.cached_teacher import CachedTeacher
from llava_mod_hf.training.mimic_trainer import MimicTrainer
from llava_mod_hf.training.run_folder import start_run, train_and_save

OPTIONS = (
    "data.arguments:DataArguments",
    "commands.arguments:DistillArguments",
    "commands.arguments:UpcycleArguments",
    "training.mimic_config:MimicConfig",
)


def run(data_args, distill_args, upcycle_args, args):
    """Mimic distillation, dense-to-dense or, with `moe_layers`, dense-to-sparse (paper, stage 2)."""
    check_experts(upcycle_args)
    if upcycle_args.moe_layers is not None:
        refuse_adapter_of_new_student(args, "makes a sparse student (`moe_layers`)")
    begun = start_run(data_args, distill_args, upcycle_args, args)
    columns = ("prompt", "completion")
    rows = load_rows(data_args, columns=columns, seed=args.seed, num_proc=args.dataset_num_proc, dropped=begun.dropped)
    eval_rows = load_eval_rows(data_args, args, columns, begun.dropped)
    student, processor = load_student(distill_args, args.trust_remote_code)
    rows = fit_to_recipe(rows, student, processor, data_args, args, begun.dropped)
    eval_rows = fit_to_recipe(eval_rows, student, processor, data_args, args, begun.dropped, evaluated=True)
    student = upcycle_student(student, upcycle_args, router_aux_loss_coef=args.router_aux_loss_coef, seed=args.seed)
    teacher, teacher_processor = None, None
    if args.kl_weight:
        teacher, teacher_processor = load_teacher_or_cache(distill_args, args.trust_remote_code, CachedTeacher)
    trainer = MimicTrainer(
        student,
        teacher,
        args,
        train_dataset=rows,
        eval_dataset=eval_rows,
        processing_class=processor,
        teacher_processor=teacher_processor,
    )
    stage = "mimic_sparse" if student.config.moe_layers else "mimic_dense"
    return train_and_save(trainer, stage, begun)
