"""What the trainers ask of a teacher: loading it, and refusing one that the student cannot learn from."""

from transformers import AutoModelForImageTextToText, AutoProcessor, ProcessorMixin

from llava_mod_hf.embedded import resolve


def load_model_and_processor(name, *, dtype="float32", attn_implementation=None, trust_remote_code=False):
    """
    A LLaVA and its processor.

    Args:
        name (`str`): Hub name, folder or `embedded:…` name.
        dtype (`str`, *optional*, defaults to `"float32"`): of the weights in memory.
        attn_implementation (`str`, *optional*): as in transformers, such as `"sdpa"` or `"eager"`.
        trust_remote_code (`bool`, *optional*, defaults to `False`): whether code from that repository may run.

    Returns:
        `tuple[PreTrainedModel, ProcessorMixin]`.

    Raises:
        ValueError: if the folder has no processor, only a tokenizer.
    """
    path = resolve(name)
    model = AutoModelForImageTextToText.from_pretrained(
        path, dtype=dtype, attn_implementation=attn_implementation, trust_remote_code=trust_remote_code
    )
    processor = AutoProcessor.from_pretrained(path, trust_remote_code=trust_remote_code)
    if not isinstance(processor, ProcessorMixin):
        raise ValueError(
            f"`{name}` comes with a {type(processor).__name__}, not with a processor of text and images: save the "
            "processor beside the model with `processor.save_pretrained`."
        )
    return model, processor


def check_teacher(student, teacher, processor, teacher_processor=None):
    """
    Refuses a teacher whose distributions the student cannot be compared with, token by token.

    Args:
        student, teacher (`PreTrainedModel`): LLaVA-like models.
        processor (`ProcessorMixin`): the student's.
        teacher_processor (`ProcessorMixin`, *optional*): the teacher's; without it only the models are compared.

    Raises:
        ValueError: if vocabulary, image token or the number of image tokens differ.
    """
    size, teacher_size = (model.config.get_text_config().vocab_size for model in (student, teacher))
    if size != teacher_size:
        raise ValueError(
            f"The teacher's vocabulary has {teacher_size} entries and the student's {size}: distillation compares "
            "distributions over the same tokens, so take a teacher and a language model of the same tokenizer."
        )
    if teacher_processor is not None:
        vocabulary, other = processor.tokenizer.get_vocab(), teacher_processor.tokenizer.get_vocab()
        differing = sorted(vocabulary.items() ^ other.items(), key=lambda entry: (entry[1], entry[0]))
        if differing:
            token, index = differing[0]
            raise ValueError(
                f"The tokenizers of teacher and student differ, first at token {token!r} with id {index}: take a "
                "teacher and a language model of the same tokenizer."
            )
    for name in ("image_token_id", "image_seq_length"):
        ours, theirs = getattr(student.config, name, None), getattr(teacher.config, name, None)
        if ours != theirs:
            raise ValueError(
                f"The teacher has `{name}` {theirs} and the student {ours}: both read the same token ids, so they must "
                "write the same placeholders for an image."
            )
