"""How a model is asked: its mode, what it reads, and how it decodes."""

from contextlib import contextmanager

import torch


@contextmanager
def evaluating(model):
    """Evaluation mode without gradients; each module is back in its own mode afterwards."""
    # module by module: a frozen vision tower may be in evaluation mode while the rest is training
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():  # torchao's weights cannot be indexed in inference mode
            yield
    finally:
        for module, training in modes:
            module.training = training


def inputs_for(model, batch):
    """The tensors of a batch on the model's device, the images in its precision."""
    return {
        name: tensor.to(model.device, model.dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in batch.items()
        if name != "labels"
    }


def read_prompts(processor, conversations):
    """
    What a model answers to.

    Args:
        processor (`ProcessorMixin`): with a chat template.
        conversations (`list[list[dict]]`): messages, their pictures among their parts, each up to a question.

    Returns:
        [`~transformers.BatchFeature`]: tensors, padded on the left, so that each prompt ends where its answer begins.
    """
    return processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        # as in training, no special tokens are added to those of the template
        processor_kwargs={"padding": True, "padding_side": "left", "add_special_tokens": False},
    )


def generation_options(
    model, processor, *, max_new_tokens, temperature=0.0, top_p=1.0, top_k=0, repetition_penalty=1.0
):
    """
    How `generate` decodes, whatever a checkpoint's `generation_config` asks for: some come with sampling.

    Args:
        model (`PreTrainedModel`), processor (`ProcessorMixin`).
        max_new_tokens (`int`): where an answer without an end is cut.
        temperature (`float`, *optional*, defaults to 0.0): of the sampling; 0 takes the most likely token.
        top_p (`float`, *optional*, defaults to 1.0), top_k (`int`, *optional*, defaults to 0): sample among the most
            likely tokens of this total probability, and among so many of them, 0 for all; without sampling, nothing.
        repetition_penalty (`float`, *optional*, defaults to 1.0): 1 for none.

    Returns:
        `dict`: arguments of `generate`.
    """
    options = {"num_beams": 1, "repetition_penalty": repetition_penalty, "use_cache": True}
    options |= {"do_sample": temperature > 0, "max_new_tokens": max_new_tokens}
    if temperature > 0:
        options |= {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    ends = model.generation_config.eos_token_id or processor.tokenizer.eos_token_id
    return options | {"eos_token_id": ends, "pad_token_id": processor.tokenizer.pad_token_id}
