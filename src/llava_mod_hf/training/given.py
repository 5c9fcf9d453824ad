"""What a trainer is given beside its options: checked, its rows split and its adapter made as the options say."""

from llava_mod_hf.training.lora import lora_config
from llava_mod_hf.training.trainer_options import check_trainer
from llava_mod_hf.training.validation import with_held_out


def given(args, config_class, model, *, teachers=(), peft_config=None, **arguments):
    """
    A trainer's arguments as its parent takes them.

    Args:
        args, config_class, model, teachers, peft_config, arguments: as for
            [`~llava_mod_hf.training.trainer_options.check_trainer`].

    Returns:
        `dict`: `arguments` with `train_dataset`, `eval_dataset` and `peft_config`.

    Raises:
        ValueError: naming what would not be used, or is said twice.
    """
    check_trainer(args, config_class, model, teachers=teachers, peft_config=peft_config, **arguments)
    own = lora_config(args, model)
    if own is not None and peft_config is not None:
        raise ValueError("`use_peft` is true, and there is a `peft_config` as well: give one of the two.")
    return {**with_held_out(args, **arguments), "peft_config": peft_config if own is None else own}
