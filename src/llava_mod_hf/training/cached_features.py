"""A trainer whose models read what frozen vision encoders made of pictures before."""

from peft import PeftModel
from transformers import LlavaModel
from transformers.integrations import is_deepspeed_zero3_enabled

from llava_mod_hf.data.held_out import count_pictures
from llava_mod_hf.teachers.protocol import row_sets
from llava_mod_hf.teachers.unique_images import keep_features
from llava_mod_hf.teachers.vision_cache import VisionCache, bytes_of_picture, check_cacheable, check_room


def use_vision_cache(trainer, *teachers):
    """
    Lets a trainer's models encode the pictures of a batch once, and with `vision_cache` those alone that no batch had.

    Args:
        trainer (`Trainer`): whose student has frozen what it does not train.
        teachers (`PreTrainedModel`): beside the student; those that are no LLaVAs are left as they are.

    Raises:
        ValueError: if the student's features cannot be kept, nothing can be written, or there is no room.
    """
    args, student = trainer.args, trainer.accelerator.unwrap_model(trainer.model)
    student = student.get_base_model() if isinstance(student, PeftModel) else student
    cache = None
    if args.vision_cache is not None:
        if trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled():
            raise ValueError(
                "`vision_cache` lets a process skip the encoder, which FSDP2 and ZeRO-3 spread over all of them: leave "
                "it out, or give DDP or ZeRO-2."
            )
        check_cacheable(student)
        cache = VisionCache(args.vision_cache)
        sizes = {}
        for base in (model.base_model for model in (student, *teachers)):
            if isinstance(base, LlavaModel):
                encoder = getattr(base.vision_tower, "source", base.vision_tower)
                itemsize = min(encoder.dtype.itemsize, 2 if args.bf16 or args.fp16 else 8)
                sizes[cache.encoder_name(encoder)] = bytes_of_picture(base.config, itemsize)
        counts = [count_pictures(rows) for rows in row_sets(trainer.train_dataset, trainer.eval_dataset)]
        check_room(args.vision_cache, sum(count or 0 for count in counts), list(sizes.values()))
    keep_features(cache, student, *teachers)
