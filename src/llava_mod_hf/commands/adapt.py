"""`llava-mod adapt`: initialise the adaptor between vision encoder and language model."""

from pathlib import Path

from llava_mod_hf.commands.stage_parts import fit_to_recipe, load_eval_rows, refuse_adapter_of_new_student
from llava_mod_hf.data.load import load_rows
from llava_mod_hf.students.build import build_student
from llava_mod_hf.training.adapt_trainer import AdaptTrainer
from llava_mod_hf.training.run_folder import start_run, train_and_save

OPTIONS = ("data.arguments:DataArguments", "commands.arguments:StudentArguments", "training.adapt_config:AdaptConfig")


def run(data_args, student_args, args):
    """Adaptor initialisation: next-token cross-entropy, only the adaptor is trained (paper, stage 1)."""
    refuse_adapter_of_new_student(args, "makes the student")
    begun = start_run(data_args, student_args, args)
    columns = ("prompt", "completion")
    rows = load_rows(data_args, columns=columns, seed=args.seed, num_proc=args.dataset_num_proc, dropped=begun.dropped)
    eval_rows = load_eval_rows(data_args, args, columns, begun.dropped)
    template = Path(args.chat_template_path).read_text() if args.chat_template_path else None
    args.chat_template_path = None  # read here: the parent would expect a tokenizer that has it already
    model, processor = build_student(
        student_args.vision_tower,
        student_args.language_model,
        chat_template=template,
        dtype=student_args.student_dtype,
        trust_remote_code=args.trust_remote_code,
        seed=args.seed,
    )
    rows = fit_to_recipe(rows, model, processor, data_args, args, begun.dropped)
    eval_rows = fit_to_recipe(eval_rows, model, processor, data_args, args, begun.dropped, evaluated=True)
    trainer = AdaptTrainer(model, args, train_dataset=rows, eval_dataset=eval_rows, processing_class=processor)
    return train_and_save(trainer, "adapt", begun)
