"""`llava-mod prefer`: preference distillation with the teacher as reference."""

from llava_mod_hf.commands.stage_parts import fit_to_recipe, load_eval_rows, load_student, load_teacher_or_cache
from llava_mod_hf.data.load import load_rows
from llava_mod_hf.teachers.reference_model import CachedReference
from llava_mod_hf.training.preference_trainer import PreferenceTrainer
from llava_mod_hf.training.run_folder import start_run, train_and_save

OPTIONS = (
    "data.arguments:DataArguments",
    "commands.arguments:DistillArguments",
    "training.preference_config:PreferenceConfig",
)


def run(data_args, distill_args, args):
    """Preference distillation with the teacher as reference, or the student as it was (paper, stage 3)."""
    begun = start_run(data_args, distill_args, args)
    columns = ("prompt", "chosen", "rejected")
    rows = load_rows(data_args, columns=columns, seed=args.seed, num_proc=args.dataset_num_proc, dropped=begun.dropped)
    eval_rows = load_eval_rows(data_args, args, columns, begun.dropped)
    student, processor = load_student(distill_args, args.trust_remote_code)
    rows = fit_to_recipe(rows, student, processor, data_args, args, begun.dropped)
    eval_rows = fit_to_recipe(eval_rows, student, processor, data_args, args, begun.dropped, evaluated=True)
    teacher, teacher_processor = None, None
    if args.reference == "teacher":
        teacher, teacher_processor = load_teacher_or_cache(distill_args, args.trust_remote_code, CachedReference)
    trainer = PreferenceTrainer(
        student,
        teacher,
        args,
        train_dataset=rows,
        eval_dataset=eval_rows,
        processing_class=processor,
        teacher_processor=teacher_processor,
    )
    return train_and_save(trainer, "prefer", begun)
