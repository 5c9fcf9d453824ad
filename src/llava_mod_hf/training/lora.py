"""Low-rank adapters of a student: from the words of a recipe to peft's, and what must not be trained with one."""

import re

from peft import PeftModel
from torch import nn
from trl import ModelConfig, get_peft_config

from llava_mod_hf.training.lora_options import ALL, check_parameters, targets
from llava_mod_hf.training.trainable import find_part

# where transformers' language models have them, in each layer
BLOCKS = {"attention": "self_attn", "ffn": "mlp"}

# without biases; what low-rank experts share is an FFN
PARAMETERS = {"experts": re.compile(r"mlp\.experts\.(?!\w+_bias$)\w+$"), "router": re.compile(r"mlp\.gate\.weight$")}


SAVE_FIRST = "save it, by `llava-mod upcycle` or `save_pretrained`, and give that folder"


def lora_config(options, student):
    """
    The adapter that a recipe describes, made by [`~trl.get_peft_config`].

    Args:
        options ([`~llava_mod_hf.training.lora_options.LoraOptions`]): of a trainer's arguments.
        student (`PreTrainedModel`): which is loaded from somewhere, for that is what an adapter's folder names.

    Returns:
        [`~peft.LoraConfig`], or `None` without `use_peft`.

    Raises:
        ValueError: if the student was made in memory, has nothing that a word names, or if what it has allows no
            dropout.
    """
    if not options.use_peft:
        return None
    if isinstance(student, PeftModel):
        raise ValueError("`use_peft` is true, and the student has an adapter already: leave the option out.")
    if isinstance(student, str):
        raise ValueError(
            f"`use_peft` looks for its targets in the student, and `{student}` is not loaded yet: load it before, or "
            "give a `peft_config`."
        )
    if not student.name_or_path:
        raise ValueError(
            "`use_peft` is true, and this student was made in memory, while an adapter's folder names the student that "
            f"it belongs to: {SAVE_FIRST}."
        )
    modules, parameters = options.lora_target_modules, options.lora_target_parameters
    if not (modules or parameters):
        modules, parameters = _targets(options, student)
    return get_peft_config(
        ModelConfig(
            use_peft=True,
            lora_r=options.lora_r,
            lora_alpha=options.lora_alpha,
            lora_dropout=options.lora_dropout,
            lora_target_modules=modules or [],
            lora_target_parameters=parameters or None,
            lora_modules_to_save=options.lora_modules_to_save or _saved_whole(options, student),
            use_rslora=options.use_rslora,
            use_dora=options.use_dora,
        )
    )


def _saved_whole(options, student):
    """The adaptor, which is small and new, is trained as a whole beside an adapter of the rest."""
    trained = options.train_modules is None or "adaptor" in options.train_modules
    return [find_part(student, "adaptor")[0]] if trained else None


def _targets(options, student):
    """A regular expression for modules, `None` for no module, and the names of parameters."""
    words, all_needed = targets(options)
    name, part = find_part(student, "language_model")
    linears = [key for key, module in part.named_modules() if isinstance(module, nn.Linear)]
    known = [key for key, _ in part.named_parameters()]
    modules, parameters = [], []
    for word in words:
        if word in BLOCKS:
            block = BLOCKS[word] + "."
            found = {re.escape(key[key.index(block) :]) for key in linears if block in key}
            modules += sorted(found)
        else:
            found = {match[0] for key in known if (match := PARAMETERS[word].search(key))}
            parameters += sorted(found)
        if all_needed and not found:
            raise ValueError(
                f"`lora_target` names `{word}`, and this {type(student).__name__} has none: leave it out, or give "
                f"`{ALL}` for what there is."
            )
    check_parameters(options, parameters)
    # below the language model: the vision tower's attention has the same names
    return f".*{name}\\..*\\.({'|'.join(modules)})" if modules else None, parameters
